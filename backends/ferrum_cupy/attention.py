"""Attention kernels: which one, over what grid, and the cache that they read.

Clauses: BK-CUPY-9..10 (specs/backend_cupy.md), KN-ATTN-*, KN-PAGED-* (specs/kernels.md).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_cupy.machine import STORAGE
from ferrum_cupy.runtime import Runtime, as_integers
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, Ints

QUERIES_PER_BLOCK: Final = 8  # as in attention.cu
SHARED_HEADS: Final = 4
DECODE_THREADS: Final = 128
KEYS_PER_SPLIT: Final = 256  # at least
BLOCKS_AIMED_AT: Final = 4096  # several times what a large GPU runs at once
LARGEST_HEAD: Final = 256
MAX_SPLITS: Final = 64


def attention(
    runtime: Runtime, q: CupyTensor, k: object, v: object, params: AttentionParams, sinks: object | None
) -> CupyTensor:
    """softmax(scale Q K^T + mask) V over contiguous keys: q (B, Sq, H, D), k and v (B, Skv, G, D). Pure.

    Raises ShapeError for other shapes; UnsupportedError for heads above 256 or values of another size than keys.
    """
    operation = "attention"
    keys, values = runtime.float_of(operation, "k", k), runtime.float_of(operation, "v", v)
    shapes = q.shape(), keys.shape(), values.shape()
    if any(len(s) != 4 for s in shapes) or shapes[1][:3] != shapes[2][:3] or shapes[0][0] != shapes[1][0]:
        raise ShapeError(
            f"{operation}: q {shapes[0]}, k {shapes[1]}, v {shapes[2]}; "
            "expected (B, Sq, H, D), (B, Skv, G, D), (B, Skv, G, D)"
        )
    _check_heads(operation, shapes[0], shapes[1], params)
    if shapes[2][3] != shapes[1][3]:
        raise UnsupportedError(
            f"{operation}: values of size {shapes[2][3]} beside keys of size {shapes[1][3]}; pad them"
        )
    lengths = np.full(shapes[0][0], shapes[1][1], np.int64)
    places = (None, shapes[1][1], 0, 1)
    return _attend(runtime, operation, q, keys, values, lengths, places, params, sinks)


def paged_attention(
    runtime: Runtime,
    q: CupyTensor,
    k_cache: object,
    v_cache: object,
    block_table: Ints,
    params: AttentionParams,
    context_lens: Ints | None,
    sinks: object | None,
) -> CupyTensor:
    """The same over keys and values in blocks; q (B, H, D) or (B, T, H, D), caches (blocks, block_size, G, D). Pure.

    Raises ShapeError; BackendError for a length or a block out of range; UnsupportedError for heads above 256.
    """
    operation = "paged_attention"
    keys, values = runtime.float_of(operation, "k_cache", k_cache), runtime.float_of(operation, "v_cache", v_cache)
    shape, cache = q.shape(), keys.shape()
    if len(shape) not in (3, 4) or len(cache) != 4 or cache != values.shape():
        raise ShapeError(
            f"{operation}: q {shape}, k_cache {cache}, v_cache {values.shape()}; "
            "expected (B, [T,] H, D) and two equal caches (num_blocks, block_size, G, D)"
        )
    queries = q if len(shape) == 4 else q.reshape((shape[0], 1, *shape[1:]))
    _check_heads(operation, queries.shape(), cache, params)
    table, lengths = check_table(queries.shape()[0], block_table, context_lens, cache)
    places = (runtime.indices(table), 0, table.shape[1], cache[1])
    return _attend(runtime, operation, queries, keys, values, lengths, places, params, sinks).reshape(shape)


def _attend(
    runtime: Runtime,
    operation: str,
    q: CupyTensor,
    k: CupyTensor,
    v: CupyTensor,
    lengths: NDArray[np.int64],
    places: tuple[Any, int, int, int],
    params: AttentionParams,
    sinks: object | None,
) -> CupyTensor:
    """places: block table or None, keys between sequences, blocks of a row of the table, keys of a block."""
    machine, xp = runtime.machine, runtime.machine.xp
    batch, tokens, heads, size = q.shape()
    if size > LARGEST_HEAD:
        raise UnsupportedError(f"{operation}: head size {size}, expected at most {LARGEST_HEAD}")
    extra = _sinks(runtime, operation, sinks, params, q)
    data = xp.ascontiguousarray(q.array)
    keys, values = runtime.same_float(operation, "k", k, q), runtime.same_float(operation, "v", v, q)
    out = xp.empty_like(data)
    if not data.size:
        return CupyTensor(machine, out, q.kind)
    table, stride, max_blocks, block_size = places
    counts = runtime.indices(lengths)
    defines = {"STORAGE": STORAGE[q.kind], "HEAD_DIM": size, "SHARED": SHARED_HEADS}
    common = (
        np.int32(heads),
        np.int32(params.num_kv_heads),
        np.int64(stride),
        np.int32(max_blocks),
        np.int32(block_size),
    )
    scale, cap = np.float32(params.softmax_scale), np.float32(params.logit_softcap)
    window = np.int32(params.sliding_window)
    if tokens > 1:
        grid = (-(-tokens // QUERIES_PER_BLOCK), heads, batch)
        head = (data, keys, values, table, counts, extra, out, np.int32(tokens), *common, scale, cap)
        many = (*head, np.int32(params.causal), window)
        machine.launch("attention", "attend_many", defines, grid, QUERIES_PER_BLOCK * 32, many)
        return CupyTensor(machine, out, q.kind)
    groups = -(-(heads // params.num_kv_heads) // SHARED_HEADS)
    splits = num_splits(int(lengths.max(initial=0)), batch * params.num_kv_heads * groups)
    partial = xp.empty((batch, heads, splits, size), np.float32)
    marks = xp.empty((batch, heads, splits, 2), np.float32)
    grid = (splits, params.num_kv_heads * groups, batch)
    arguments = (data, keys, values, table, counts, partial, marks, *common, np.int32(splits), scale, cap, window)
    machine.launch("attention", "attend_one", defines, grid, DECODE_THREADS, arguments)
    merged = (partial, marks, extra, out, np.int32(heads), np.int32(splits))
    machine.launch("attention", "merge_splits", defines, (batch * heads, 1, 1), DECODE_THREADS, merged)
    return CupyTensor(machine, out, q.kind)


def num_splits(longest: int, num_blocks: int) -> int:
    """Among how many blocks of threads the keys of each of `num_blocks` groups of heads are divided. Pure."""
    return max(1, min(MAX_SPLITS, -(-longest // KEYS_PER_SPLIT), -(-BLOCKS_AIMED_AT // max(1, num_blocks))))


def write_kv(runtime: Runtime, cache: CupyTensor, rows: object, slots: Ints) -> None:
    """cache[slots[t]] = rows[t], the cache (..., G, D) seen as (N, G, D).

    Negative slots are skipped, of equal ones the last row stays.

    Mutates cache. Raises BackendError, before anything is written, for a slot >= N, other shapes or types, and
    read-only memory.
    """
    new = runtime.beside("write_kv", "rows", rows)
    if cache.is_read_only:
        raise BackendError("write_kv: cache: lies in read-only memory, expected a tensor of the factory; copy it first")
    shape, added = cache.shape(), new.shape()
    if len(shape) < 3 or len(added) != 3 or added[1:] != shape[-2:] or new.kind is not cache.kind:
        raise ShapeError(
            f"write_kv: cache {shape} of {cache.kind.name} and rows {added} of {new.kind.name}, "
            "expected (..., G, D) and (T, G, D) of one element type"
        )
    if not cache.is_contiguous():
        raise ShapeError(f"write_kv: cache {shape} cannot be written as one run of slots; pass a contiguous cache")
    index = as_integers("write_kv", "slots", slots)
    if len(index) != added[0]:
        raise ShapeError(f"write_kv: {len(index)} slots for {added[0]} rows, expected one for each")
    if not len(index):
        return
    flat = cache.array.reshape(-1, *shape[-2:])
    if int(index.max()) >= flat.shape[0]:
        raise BackendError(f"write_kv: slot {int(index.max())}, expected below {flat.shape[0]}, the size of the cache")
    different, from_the_end = np.unique(index[::-1], return_index=True)
    if len(different) == len(index) and different[0] >= 0:
        flat[runtime.indices(index)] = new.array
        return
    kept = np.asarray(len(index) - 1 - from_the_end, dtype=np.int64)
    kept = kept[index[kept] >= 0]
    flat[runtime.indices(index[kept])] = new.array[runtime.indices(kept)]


def check_table(
    batch: int, block_table: Ints, context_lens: Ints | None, cache_shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The table as (B, max_blocks) and the lengths, every needed block and length within range. Pure."""
    num_blocks, block_size = cache_shape[:2]
    two_axes = np.ndim(block_table) == 2
    table = as_integers("paged_attention", "block_table", block_table, ndim=2 if two_axes else 1)
    table = table if two_axes else table[None]
    covered = table.shape[1] * block_size
    lengths = np.full(batch, covered, np.int64)
    if context_lens is not None:
        lengths = as_integers("paged_attention", "context_lens", context_lens)
    if table.shape[0] != batch or len(lengths) != batch:
        raise ShapeError(
            f"paged_attention: {batch} sequences, block_table {table.shape}, {len(lengths)} context_lens; "
            "expected one row and one length for each sequence"
        )
    bad_lengths = np.flatnonzero((lengths < 0) | (lengths > covered))
    if bad_lengths.size:
        b = int(bad_lengths[0])
        raise BackendError(
            f"paged_attention: context_lens[{b}] is {int(lengths[b])}, expected 0 <= length <= {covered}, "
            "the covered slots"
        )
    if table.size and 0 <= int(table.min()) <= int(table.max()) < num_blocks:
        return table, lengths  # all there is, needed or not: the usual case, and quickly told
    is_needed = np.arange(table.shape[1]) * block_size < lengths[:, None]
    bad = np.argwhere(is_needed & ((table < 0) | (table >= num_blocks)))
    if bad.size:
        b, column = (int(index) for index in bad[0])
        raise BackendError(
            f"paged_attention: block_table[{b}] names block {int(table[b, column])}, expected 0 <= block < {num_blocks}"
        )
    return table, lengths


def _check_heads(operation: str, q: tuple[int, ...], k: tuple[int, ...], params: AttentionParams) -> None:
    got = (q[2], k[2], q[3], k[3])
    if got != (params.num_heads, params.num_kv_heads, params.head_dim, params.head_dim):
        raise ShapeError(
            f"{operation}: q has {got[0]} heads of size {got[2]} and k {got[1]} of size {got[3]}; expected "
            f"{params.num_heads} and {params.num_kv_heads} of size {params.head_dim}, as params say"
        )


def _sinks(runtime: Runtime, operation: str, sinks: object | None, params: AttentionParams, q: CupyTensor) -> Any:
    if sinks is None:
        return None
    found = runtime.float_of(operation, "sinks", sinks)
    if found.shape() != (params.num_heads,):
        raise ShapeError(
            f"{operation}: sinks {found.shape()}, expected one logit for each of the {params.num_heads} heads"
        )
    return runtime.same_float(operation, "sinks", found, q)
