"""Attention over contiguous and over paged keys and values, and the cache write.

Clauses: BK-NCUDA-13, BK-NCUDA-16 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferrum_numba.gpu.casting import cast_float
from ferrum_numba.gpu.integers import IntArray, as_integers
from ferrum_numba.gpu.kernel import Kernel
from ferrum_numba.gpu.kernels import attend_one
from ferrum_numba.gpu.kernels import attention as kernels
from ferrum_numba.gpu.linear import move_rows
from ferrum_numba.gpu.runtime import whole_warps
from ferrum_numba.gpu.storage import Storage, storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_numba.gpu.wide import PACK
from ferrum_ref.errors import BackendError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, Ints
from ferrum_ref.types.devices import DataType

THREADS = kernels.ROWS * kernels.KEYS
MOST_HEAD_DIM = 1024  # 8 rows of float32 sums beside 11 KB of slices, in 48 KB of shared memory


def attention(
    q: NumbaTensor, k: NumbaTensor, v: NumbaTensor, params: AttentionParams, sinks: NumbaTensor | None
) -> NumbaTensor:
    """q (B, Sq, H, D), k and v (B, Skv, G, D) -> (B, Sq, H, D). Pure. Raises ShapeError for other shapes."""
    if q.ndim() != 4 or k.ndim() != 4 or k.shape() != v.shape() or q.shape()[0] != k.shape()[0]:
        raise ShapeError(
            f"attention: q {q.shape()}, k {k.shape()}, v {v.shape()}; "
            "expected (B, Sq, H, D) and two equal (B, Skv, G, D)"
        )
    check_heads("attention", q, k, params)
    batch, num_keys = k.shape()[:2]
    table, lengths = np.arange(batch)[:, None], np.full(batch, num_keys)
    return attend("attention", q, k, v, table, lengths, params, sinks)


def paged_attention(
    q: NumbaTensor,
    k_cache: NumbaTensor,
    v_cache: NumbaTensor,
    block_table: Ints,
    params: AttentionParams,
    context_lens: Ints | None,
    sinks: NumbaTensor | None,
) -> NumbaTensor:
    """The same over keys and values in blocks; q (B, [T,] H, D), caches (num_blocks, block_size, G, D). Pure.

    Raises ShapeError for other shapes; BackendError for a length or a block out of range.
    """
    if q.ndim() not in (3, 4) or k_cache.ndim() != 4 or k_cache.shape() != v_cache.shape():
        raise ShapeError(
            f"paged_attention: q {q.shape()}, k_cache {k_cache.shape()}, v_cache {v_cache.shape()}; "
            "expected (B, [T,] H, D) and two equal caches (num_blocks, block_size, G, D)"
        )
    check_heads("paged_attention", q, k_cache, params)
    queries = q if q.ndim() == 4 else q.reshape((q.shape()[0], 1, *q.shape()[1:]))
    table, lengths = check_table(q.shape()[0], block_table, context_lens, k_cache.shape()[:2])
    result = attend("paged_attention", queries, k_cache, v_cache, table, lengths, params, sinks)
    return result.reshape(q.shape())


def attend(
    operation: str,
    q: NumbaTensor,
    k: NumbaTensor,
    v: NumbaTensor,
    table: IntArray,
    lengths: IntArray,
    params: AttentionParams,
    sinks: NumbaTensor | None,
) -> NumbaTensor:
    """q (B, T, H, D) over the blocks that `table` names for each sequence, `lengths` positions of them. Pure."""
    kind, runtime = storage_of(q.dtype(), operation), q.runtime
    if k.dtype() is not q.dtype() or v.dtype() is not q.dtype():
        raise BackendError(
            f"{operation}: q {q.dtype()}, k {k.dtype()}, v {v.dtype()}, expected one element type; "
            "convert with to_dtype"
        )
    (batch, num_tokens, num_heads, head_dim), block_size = q.shape(), k.shape()[1]
    if head_dim > MOST_HEAD_DIM:
        raise UnsupportedError(f"{operation}: head_dim: got {head_dim}, expected at most {MOST_HEAD_DIM}")
    result = NumbaTensor.empty(runtime, q.shape(), q.dtype())
    if result.numel() == 0:
        return result
    num_kv_heads = params.num_kv_heads
    num_tiles = -(-num_tokens * (num_heads // num_kv_heads) // kernels.ROWS)
    splits_apply = num_tokens <= runtime.tuning.split_rows
    split_keys = runtime.tuning.split_keys if splits_apply else max(1, int(lengths.max()))
    num_splits = max(1, -(-int(lengths.max()) // split_keys))
    parts = runtime.machine.empty(
        batch * num_tokens * num_heads * num_splits * (head_dim + 2) if num_splits > 1 else 1, np.dtype(np.float32)
    )
    device_lengths, sink_logits = runtime.integers(lengths), _sinks(operation, q, sinks, num_heads)
    causal, window, has_sinks = int(params.causal), params.sliding_window, int(sinks is not None)
    arrays = (q.flat(), k.flat(), v.flat())
    memory = (*arrays, runtime.integers(table), device_lengths, sink_logits, result.array, parts)
    blocks = (max(1, block_size), table.shape[1], num_splits, split_keys)
    numbers = (np.float32(params.softmax_scale), np.float32(params.logit_softcap), causal, window, has_sinks)
    if num_tokens == 1 and is_wide(head_dim) and all(runtime.machine.is_aligned(array) for array in arrays):
        runtime.launch(
            *one_token(kind, batch, num_heads, num_kv_heads, num_splits),
            *memory,
            *(num_heads, num_kv_heads, head_dim, attend_one.lanes_of(head_dim), *blocks, *numbers),
            shared_bytes=attend_one.shared_bytes(kind, num_heads, num_kv_heads, head_dim),
        )
    else:
        runtime.launch(
            kernels.attention,
            (kind,),
            num_tiles * num_splits * num_kv_heads * batch,
            THREADS,
            *(*memory, num_tokens, num_heads, num_kv_heads, head_dim, *blocks, *numbers),
            shared_bytes=4 * kernels.ROWS * head_dim,
        )
    if num_splits > 1:
        arguments = (parts, device_lengths, sink_logits, result.array, num_tokens, num_heads, head_dim, num_splits)
        grid, threads = batch * num_tokens * num_heads, whole_warps(head_dim)
        runtime.launch(kernels.merge, (kind,), grid, threads, *arguments, causal, window, has_sinks)
    return result


def is_wide(head_dim: int) -> bool:
    """Whether the kernel for one new token has room for heads of this size and reads them in whole packs. Pure."""
    return head_dim % PACK == 0 and head_dim <= attend_one.MOST_HEAD_DIM


def one_token(
    kind: Storage, batch: int, num_heads: int, num_kv_heads: int, num_splits: int
) -> tuple[Callable[..., Kernel], tuple[Storage, int], int, int]:
    """The kernel for one new token a sequence: maker, what it is made of, grid, block. Pure."""
    share = attend_one.shared_by(kind, num_heads, num_kv_heads)
    grid = attend_one.blocks_for(kind, batch, num_heads, num_kv_heads, num_splits)
    return attend_one.attend_one, (kind, share), grid, attend_one.THREADS


def write_kv(cache: NumbaTensor, rows: NumbaTensor, slots: Ints) -> None:
    """cache[slots[t]] = rows[t], with the cache (..., G, D) seen as (N, G, D). Mutates cache.

    A negative slot skips its row; of equal slots the last row stays. Raises BackendError, before anything is written,
    for a slot >= N, other shapes or types, or a cache that is no run.
    """
    shape = cache.shape()
    if len(shape) < 3 or rows.ndim() != 3 or rows.shape()[1:] != shape[-2:] or rows.dtype() is not cache.dtype():
        raise ShapeError(
            f"write_kv: cache {shape} of {cache.dtype()} and rows {rows.shape()} of {rows.dtype()}, "
            "expected (..., G, D) and (T, G, D) of one element type"
        )
    if not cache.is_contiguous():
        raise ShapeError(
            f"write_kv: cache {shape} with strides {cache.strides} cannot be written as one run of slots; "
            "pass a contiguous cache"
        )
    index = as_integers("write_kv", "slots", slots)
    length = shape[-2] * shape[-1]
    num_slots = cache.numel() // length if length else 0
    if len(index) != rows.shape()[0]:
        raise ShapeError(f"write_kv: {len(index)} slots for {rows.shape()[0]} rows, expected one for each")
    if len(index) and int(index.max()) >= num_slots:
        raise BackendError(f"write_kv: slot {int(index.max())}, expected below {num_slots}, the size of the cache")
    kept = last_of_each(index)
    move_rows(rows.flat(), cache.flat(), kept, index[kept], length, cache)


def last_of_each(slots: IntArray) -> IntArray:
    """Where each slot that is not negative occurs for the last time. Pure."""
    _, from_the_end = np.unique(slots[::-1], return_index=True)
    positions = np.asarray(len(slots) - 1 - from_the_end, dtype=np.int64)
    return positions[slots[positions] >= 0]


def check_heads(operation: str, q: NumbaTensor, k: NumbaTensor, params: AttentionParams) -> None:
    """Raises ShapeError unless the tensors have the heads and head sizes that params announce."""
    got = (q.shape()[-2], k.shape()[-2], q.shape()[-1], k.shape()[-1])
    if got != (params.num_heads, params.num_kv_heads, params.head_dim, params.head_dim):
        raise ShapeError(
            f"{operation}: q has {got[0]} heads of size {got[2]} and k {got[1]} of size {got[3]}; expected "
            f"{params.num_heads} and {params.num_kv_heads} of size {params.head_dim}, as params say"
        )


def check_table(
    batch: int, block_table: Ints, context_lens: Ints | None, blocks: tuple[int, ...]
) -> tuple[IntArray, IntArray]:
    """The table as (B, max_blocks) and the lengths, every needed block and length within range. Pure."""
    (num_blocks, block_size), operation = blocks, "paged_attention"
    two_axes = np.ndim(block_table) == 2
    table = as_integers(operation, "block_table", block_table, ndim=2 if two_axes else 1)
    table = table if two_axes else table[None]
    covered = table.shape[1] * block_size
    lengths = np.full(batch, covered) if context_lens is None else as_integers(operation, "context_lens", context_lens)
    if table.shape[0] != batch or len(lengths) != batch:
        raise ShapeError(
            f"{operation}: {batch} sequences, block_table {table.shape}, {len(lengths)} context_lens; "
            "expected one row and one length for each sequence"
        )
    for b, length in enumerate(lengths):
        if not 0 <= length <= covered:
            raise BackendError(
                f"{operation}: context_lens[{b}] is {length}, expected 0 <= length <= {covered}, the covered slots"
            )
        needed = table[b, : -(-int(length) // block_size)] if length else table[b, :0]
        if needed.size and not 0 <= int(needed.min()) <= int(needed.max()) < num_blocks:
            bad = needed[(needed < 0) | (needed >= num_blocks)]
            raise BackendError(
                f"{operation}: block_table[{b}] names block {int(bad[0])}, expected 0 <= block < {num_blocks}"
            )
    return table, lengths


def _sinks(operation: str, q: NumbaTensor, sinks: NumbaTensor | None, num_heads: int) -> object:
    if sinks is None:
        return q.runtime.machine.upload(np.zeros(1, np.float32))
    if sinks.shape() != (num_heads,):
        raise ShapeError(f"{operation}: sinks {sinks.shape()}, expected ({num_heads},), one logit for each head")
    storage_of(sinks.dtype(), operation)
    return cast_float(sinks, DataType.FP32).flat()
