"""Attention over contiguous and over paged keys and values, and the cache write: what is checked, and what is launched.

Clauses: BK-NCPU-10..11, BK-NCPU-14 (specs/backend_numba.md), KN-ATTN-*, KN-PAGED-*, KN-WRITEKV-*.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.attending import KEYS_AT_A_TIME, attend, attend_keys, attend_part, join_parts
from ferrum_numba.cpu.conversion import FLOAT32, KINDS, computable, round_to, run_of, widen
from ferrum_numba.cpu.integers import as_integers
from ferrum_numba.cpu.matrices import UNPACK_RUN
from ferrum_numba.cpu.prefill import attend_block, attend_many
from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, Ints

Array = NDArray[Any]
IntArray = NDArray[np.int64]

FEW_TOKENS: Final = 4  # of a sequence: more are better served by matrix products


def attention(q: Array, k: Array, v: Array, params: AttentionParams, sinks: Array | None) -> Array:
    """o_i = sum_j p_ij v_j,  p_i = softmax over the visible j of (scale q_i . k_j)

    q (B, Sq, H, D); k (B, Skv, G, D); v (B, Skv, G, Dv); result (B, Sq, H, Dv) in q's type. Pure.
    Raises ShapeError for other shapes, and for head counts or sizes other than params say.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ShapeError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; expected (B, Sq, H, D), (B, Skv, G, D), (B, Skv, G, Dv)"
        )
    check_heads("attention", q, k, params)
    batch, num_keys = k.shape[:2]
    table = np.arange(batch, dtype=np.int64)[:, None]
    lengths = np.full(batch, num_keys, np.int64)
    return _attend("attention", q, k, v, table, lengths, max(1, num_keys), params, sinks)


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Ints,
    params: AttentionParams,
    context_lens: Ints | None,
    sinks: Array | None,
) -> Array:
    """The same over keys and values that lie in blocks; position p of sequence b is row p % block_size of block
    block_table[b, p // block_size].

    q (B, H, D) for T = 1 or (B, T, H, D); caches (num_blocks, block_size, G, D); result has q's shape and type. Slots
    at or beyond a sequence's context length are never read. Pure.
    Raises ShapeError for other shapes; BackendError for a length or a block out of range.
    """
    if q.ndim not in (3, 4) or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise ShapeError(
            f"paged_attention: q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}; "
            "expected (B, [T,] H, D) and two equal caches (num_blocks, block_size, G, D)"
        )
    check_heads("paged_attention", q, k_cache, params)
    queries = q[:, None] if q.ndim == 3 else q
    table, lengths = check_table(queries.shape[0], block_table, context_lens, k_cache.shape)
    block_size = max(1, k_cache.shape[1])
    out = _attend("paged_attention", queries, k_cache, v_cache, table, lengths, block_size, params, sinks)
    return out.reshape(q.shape)


def _attend(
    operation: str,
    q: Array,
    k: Array,
    v: Array,
    table: IntArray,
    lengths: IntArray,
    block_size: int,
    params: AttentionParams,
    sinks: Array | None,
) -> Array:
    batch, tokens, heads, size = q.shape
    groups, value_size = v.shape[2:]
    queries = run_of(widen(q, operation))
    factors = None if sinks is None else _sinks(operation, sinks, heads)
    out = np.empty((batch, tokens, heads, value_size), FLOAT32)
    keys, values = computable(k, operation), computable(v, operation)
    if keys.dtype != values.dtype:
        keys, values = widen(keys, operation), widen(values, operation)
    tables, kind, width = run_of(table), KINDS[keys.dtype], keys.dtype.itemsize
    cached = (*(address_of(array) for array in (queries, keys, values, tables)), tables.shape[1], block_size)
    sizes = (address_of(lengths), batch, tokens, heads, groups, size, value_size, size * width, value_size * width)
    seen = (int(params.causal), params.sliding_window, 0 if factors is None else address_of(factors))
    work, scales = (
        tokens * heads * size * int(lengths.sum()),
        (float(params.softmax_scale), float(params.logit_softcap)),
    )
    if tokens > FEW_TOKENS:
        decode, turn = UNPACK_RUN[kind].address, np.zeros(1, np.int64)
        attend_many(
            attend_block.address, address_of(turn), decode, *cached, *sizes, *seen, address_of(out), work, *scales
        )
        return round_to(out, q.dtype)
    splits = max(1, -(-int(lengths.max(initial=0)) // KEYS_AT_A_TIME))
    parts = np.empty(batch * splits * tokens * heads * (value_size + 2), FLOAT32)
    routines = (attend_keys.address, attend_part.address, join_parts.address)
    attend(*routines, *cached, *sizes, kind, *seen, splits, address_of(parts), address_of(out), work, *scales)
    return round_to(out, q.dtype)


def _sinks(operation: str, sinks: Array, heads: int) -> Array:
    if sinks.shape != (heads,):
        raise ShapeError(f"{operation}: sinks {sinks.shape}, expected ({heads},), one number a query head")
    return run_of(widen(sinks, operation))


def write_kv(cache: Array, rows: Array, slots: Ints) -> None:
    """cache[slots[t]] = rows[t], with the cache (..., G, D) seen as (N, G, D)

    rows (T, G, D). A negative slot skips its row; of equal slots the last row stays. Mutates cache.
    Raises BackendError, before anything is written, for a slot >= N, other shapes or types, a cache that is no run, or
    one that may not be written.
    """
    if cache.ndim < 3 or rows.ndim != 3 or rows.shape[1:] != cache.shape[-2:] or rows.dtype != cache.dtype:
        raise ShapeError(
            f"write_kv: cache {cache.shape} of {cache.dtype} and rows {rows.shape} of {rows.dtype}, "
            "expected (..., G, D) and (T, G, D) of one element type"
        )
    if not cache.flags.writeable:
        raise BackendError(
            "write_kv: cache: lies in memory that may not be written, expected a tensor of the factory; "
            "copy it with from_tensor"
        )
    index = as_integers("write_kv", "slots", slots)
    num_slots = math.prod(cache.shape[:-2])
    try:
        flat = cache.reshape((num_slots, *rows.shape[1:]), copy=False)
    except ValueError:
        raise ShapeError(
            f"write_kv: cache {cache.shape} with strides {cache.strides} cannot be written as one run of slots; "
            "pass a contiguous cache"
        ) from None
    if len(index) != rows.shape[0]:
        raise ShapeError(f"write_kv: {len(index)} slots for {rows.shape[0]} rows, expected one for each")
    if not len(index):
        return
    if int(index.max()) >= num_slots:
        raise BackendError(f"write_kv: slot {int(index.max())}, expected below {num_slots}, the size of the cache")
    first = int(index[0])
    if first >= 0 and bool((np.diff(index) == 1).all()):  # one run, as a prompt writes it
        flat[first : first + len(index)] = rows
        return
    kept = last_of_each(index)
    flat[index[kept]] = rows[kept]


def last_of_each(slots: IntArray) -> IntArray:
    """Where each slot that is not negative occurs for the last time. Pure."""
    _, from_the_end = np.unique(slots[::-1], return_index=True)
    positions = np.asarray(len(slots) - 1 - from_the_end, dtype=np.int64)
    return positions[slots[positions] >= 0]


def check_heads(operation: str, q: Array, k: Array, params: AttentionParams) -> None:
    """Raises ShapeError unless the tensors have the heads and head sizes that params announce."""
    got = (q.shape[-2], k.shape[-2], q.shape[-1], k.shape[-1])
    if got != (params.num_heads, params.num_kv_heads, params.head_dim, params.head_dim):
        raise ShapeError(
            f"{operation}: q has {got[0]} heads of size {got[2]} and k {got[1]} of size {got[3]}; expected "
            f"{params.num_heads} and {params.num_kv_heads} of size {params.head_dim}, as params say"
        )


def check_table(
    batch: int, block_table: Ints, context_lens: Ints | None, cache_shape: tuple[int, ...]
) -> tuple[IntArray, IntArray]:
    """The table as (B, max_blocks) and the lengths, every needed block and length within range. Pure."""
    num_blocks, block_size = cache_shape[:2]
    two_axes = np.ndim(block_table) == 2
    table = as_integers("paged_attention", "block_table", block_table, ndim=2 if two_axes else 1)
    table = table if two_axes else table[None]
    covered = table.shape[1] * block_size
    lengths = np.full(batch, covered, np.int64)
    if context_lens is not None:
        lengths = np.array(as_integers("paged_attention", "context_lens", context_lens))
    if table.shape[0] != batch or len(lengths) != batch:
        raise ShapeError(
            f"paged_attention: {batch} sequences, block_table {table.shape}, {len(lengths)} context_lens; "
            "expected one row and one length for each sequence"
        )
    if not 0 <= int(lengths.min(initial=0)) <= int(lengths.max(initial=0)) <= covered:
        b = int(np.flatnonzero((lengths < 0) | (lengths > covered))[0])
        raise BackendError(
            f"paged_attention: context_lens[{b}] is {lengths[b]}, expected 0 <= length <= {covered}, the covered slots"
        )
    needed: Array = np.arange(table.shape[1]) * block_size < lengths[:, None]
    bad: Array = needed & ((table < 0) | (table >= num_blocks))
    if bad.any():
        b, place = np.argwhere(bad)[0]
        raise BackendError(
            f"paged_attention: block_table[{b}] names block {table[b, place]}, expected 0 <= block < {num_blocks}"
        )
    return table, lengths
