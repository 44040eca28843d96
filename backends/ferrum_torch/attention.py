"""Attention over contiguous and over paged keys and values, and the cache write.

Scores, softmax and sums are float32 and the probabilities stay float32; torch's fused attention computes otherwise and
is used only where a backend was made for it, and says so (`fused_attention`).
Clauses: BK-TORCH-12..14, BK-TORCH-36 (specs/backend_torch.md); KN-ATTN-*, KN-PAGED-*, KN-WRITEKV-* (kernels.md).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, Ints
from ferrum_torch.fused_attention import fused_attention, is_covered
from ferrum_torch.integers import as_integers, is_run
from ferrum_torch.rounding import round_to, widen

SCORES_AT_A_TIME = 1 << 19  # 2 MB of float32: about one core's second-level cache
MOST_SCORES_AT_A_TIME = 1 << 24  # for long contexts: fewer than ROWS_WORTH_A_PRODUCT rows make poor matrix products
ROWS_WORTH_A_PRODUCT = 32
GPU_SCORES_AT_A_TIME = 1 << 28
IntArray = NDArray[np.int64]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: AttentionParams,
    sinks: torch.Tensor | None = None,
    sdpa: bool = False,
) -> torch.Tensor:
    """o_i = sum_j p_ij v_j,  p_i = softmax over the visible j of (scale q_i . k_j)

    q (B, Sq, H, D); k (B, Skv, G, D); v (B, Skv, G, Dv); result (B, Sq, H, Dv) in q's type. A cap replaces each score
    s by cap tanh(s / cap); sinks (H,) are one more logit a head, whose share goes to nothing. `sdpa` hands the cases
    that they cover to torch's fused kernels. Pure.
    Raises ShapeError for other shapes, and for head counts or sizes other than params say.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ShapeError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected (B, Sq, H, D), (B, Skv, G, D), (B, Skv, G, Dv)"
        )
    check_heads("attention", q, k, params)
    check_sinks("attention", sinks, params)
    if sdpa and is_covered(q, k, v, params, sinks):
        return fused_attention(q, k, v, params)
    results = [attend(q[b], k[b], v[b], params, sinks) for b in range(q.shape[0])]
    if not results:
        return torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return torch.stack(results) if len(results) > 1 else results[0].unsqueeze(0)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: Ints,
    params: AttentionParams,
    context_lens: Ints | None,
    sinks: torch.Tensor | None = None,
    sdpa: bool = False,
) -> torch.Tensor:
    """The same over keys and values that lie in blocks; position p of sequence b is row p % block_size of block
    block_table[b, p // block_size].

    q (B, H, D) for T = 1 or (B, T, H, D); caches (num_blocks, block_size, G, D); result has q's shape and type. Slots
    at or beyond a sequence's context length are never read. Pure.
    Raises ShapeError for other shapes; BackendError for a length or a block out of range.
    """
    if q.ndim not in (3, 4) or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise ShapeError(
            f"paged_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; "
            "expected (B, [T,] H, D) and two equal caches (num_blocks, block_size, G, D)"
        )
    check_heads("paged_attention", q, k_cache, params)
    check_sinks("paged_attention", sinks, params)
    queries = q.unsqueeze(1) if q.ndim == 3 else q
    table, lengths = check_table(queries.shape[0], block_table, context_lens, k_cache.shape)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for b, length in enumerate(lengths):
        blocks = table[b, : -(-length // k_cache.shape[1])]
        k, v = gather_blocks(k_cache, blocks, length), gather_blocks(v_cache, blocks, length)
        if sdpa and is_covered(queries[b : b + 1], k[None], v[None], params, sinks):
            out[b] = fused_attention(queries[b : b + 1], k[None], v[None], params)[0]
        else:
            out[b] = attend(queries[b], k, v, params, sinks)
    return out.view(q.shape)


def write_kv(cache: torch.Tensor, rows: torch.Tensor, slots: Ints) -> None:
    """cache[slots[t]] = rows[t], with the cache (..., G, D) seen as (N, G, D)

    rows (T, G, D). A negative slot skips its row; of equal slots the last row stays. Mutates cache.
    Raises BackendError, before anything is written, for a slot >= N, other shapes or types, or a cache that is no run.
    """
    if cache.ndim < 3 or rows.ndim != 3 or rows.shape[1:] != cache.shape[-2:] or rows.dtype is not cache.dtype:
        raise ShapeError(
            f"write_kv: cache {tuple(cache.shape)} of {cache.dtype} and rows {tuple(rows.shape)} of {rows.dtype}, "
            "expected (..., G, D) and (T, G, D) of one element type"
        )
    index = as_integers("write_kv", "slots", slots)
    try:
        flat = cache if cache.ndim == 3 else cache.view(-1, *cache.shape[-2:])
    except RuntimeError:
        raise ShapeError(
            f"write_kv: cache {tuple(cache.shape)} with strides {cache.stride()} cannot be written as one run of "
            "slots; pass a contiguous cache"
        ) from None
    if len(index) != rows.shape[0]:
        raise ShapeError(f"write_kv: {len(index)} slots for {rows.shape[0]} rows, expected one for each")
    if not len(index):
        return
    if int(index.max()) >= flat.shape[0]:
        raise BackendError(f"write_kv: slot {int(index.max())}, expected below {flat.shape[0]}, the size of the cache")
    first = int(index[0])
    if first >= 0 and is_run(index):
        flat.narrow(0, first, len(index)).copy_(rows)
        return
    kept = last_of_each(index)
    target = torch.from_numpy(index[kept]).to(cache.device)
    flat.index_copy_(0, target, rows.index_select(0, torch.from_numpy(kept).to(cache.device)))


def last_of_each(slots: IntArray) -> IntArray:
    """Where each slot that is not negative occurs for the last time. Pure."""
    _, from_the_end = np.unique(slots[::-1], return_index=True)
    positions = np.asarray(len(slots) - 1 - from_the_end, dtype=np.int64)
    return positions[slots[positions] >= 0]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """One sequence: q (T, H, D), k (S, G, D), v (S, G, Dv) -> (T, H, Dv) in q's type; query t sits at S - T + t."""
    num_rows, num_heads, _ = q.shape
    num_keys, _, value_dim = v.shape
    first = (
        max(0, num_rows - num_keys) if params.causal else 0 if num_keys else num_rows
    )  # rows before this see nothing
    step = rows_at_a_time(num_heads * num_keys, q.is_cpu)
    if first == 0 and 0 < num_rows <= step:
        return round_to(attend_block(q, k, v, params, 0, num_rows, sinks), q.dtype)
    out = torch.zeros((num_rows, num_heads, value_dim), dtype=q.dtype, device=q.device)
    for start in range(first, num_rows, step):
        stop = min(start + step, num_rows)
        out[start:stop] = round_to(attend_block(q, k, v, params, start, stop, sinks), q.dtype)
    return out


def attend_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: AttentionParams,
    start: int,
    stop: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows [start, stop) of `attend`, each of which sees a key, in float32: (stop - start, H, Dv). Pure."""
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_groups, value_dim = v.shape
    ratio, count, offset = num_heads // num_groups, stop - start, num_keys - num_rows
    low, high = visible_keys(start, stop, offset, num_keys, params)
    if high - low != num_keys:
        k, v = k[low:high], v[low:high]
    rows = widen(q if count == num_rows else q[start:stop], "attention")
    if count == 1:
        by_group = rows.reshape(num_groups, ratio, head_dim)
    else:
        by_group = rows.reshape(count, num_groups, ratio, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(by_group, widen(k, "attention").permute(1, 2, 0)).mul_(params.softmax_scale)
    if params.logit_softcap:
        scores.div_(params.logit_softcap).tanh_().mul_(params.logit_softcap)
    if params.causal and count > 1:
        mask(scores.view(num_heads, count, high - low), offset + start - low, params.sliding_window)
    mixed = torch.bmm(shares(scores, sinks, ratio, count), widen(v, "attention").transpose(0, 1))
    if count == 1:
        return mixed.view(1, num_heads, value_dim)
    return mixed.view(num_groups, ratio, count, value_dim).permute(2, 0, 1, 3).reshape(count, num_heads, value_dim)


def shares(scores: torch.Tensor, sinks: torch.Tensor | None, ratio: int, count: int) -> torch.Tensor:
    """Softmax over the last axis, with each head's sink as one more entry that is left out of the result. Pure.

    scores (G, ratio * count, S), the rows of a head together.
    """
    if sinks is None:
        return torch.softmax(scores, -1)
    logits = widen(sinks, "attention").repeat_interleave(count).view(scores.shape[0], ratio * count, 1)
    return torch.softmax(torch.cat((scores, logits), -1), -1)[..., :-1]


def rows_at_a_time(scores_per_row: int, on_cpu: bool) -> int:
    """How many rows of queries share a matrix product. Pure."""
    if not on_cpu:
        return max(1, GPU_SCORES_AT_A_TIME // max(1, scores_per_row))
    in_cache, in_reason = SCORES_AT_A_TIME // max(1, scores_per_row), MOST_SCORES_AT_A_TIME // max(1, scores_per_row)
    return max(1, in_cache, min(ROWS_WORTH_A_PRODUCT, in_reason))


def visible_keys(start: int, stop: int, offset: int, num_keys: int, params: AttentionParams) -> tuple[int, int]:
    """The range of keys that any of the rows [start, stop) sees; the masked rest need not be computed. Pure."""
    if not params.causal:
        return 0, num_keys
    low = max(0, offset + start - params.sliding_window + 1) if params.sliding_window else 0
    return low, offset + stop


def mask(scores: torch.Tensor, position: int, window: int) -> None:
    """-inf where key column c lies ahead of row r (c > position + r) or, with a window, too far behind it. In place.

    scores (heads, rows, keys); position is the column of the first row's own key.
    """
    num_rows, num_keys = scores.shape[1:]
    ahead = torch.ones((num_rows, num_rows), dtype=torch.bool, device=scores.device).triu_(1)
    scores[:, :, num_keys - num_rows :].masked_fill_(ahead, -torch.inf)
    if window:
        own = torch.arange(position, position + num_rows, device=scores.device).unsqueeze(1)
        scores.masked_fill_(torch.arange(num_keys, device=scores.device) <= own - window, -torch.inf)


def gather_blocks(cache: torch.Tensor, blocks: IntArray, num_positions: int) -> torch.Tensor:
    """The first `num_positions` rows of the blocks, in order, as (num_positions, G, D); a view where blocks are
    neighbours in ascending order. Pure."""
    if not num_positions:
        return cache[:0].flatten(0, 1)
    if is_run(blocks):
        picked = cache[int(blocks[0]) : int(blocks[-1]) + 1]
    else:
        picked = cache.index_select(0, torch.from_numpy(np.ascontiguousarray(blocks)).to(cache.device))
    return picked.flatten(0, 1)[:num_positions]


def check_heads(operation: str, q: torch.Tensor, k: torch.Tensor, params: AttentionParams) -> None:
    """Raises ShapeError unless the tensors have the heads and head sizes that params announce."""
    got = (q.shape[-2], k.shape[-2], q.shape[-1], k.shape[-1])
    if got != (params.num_heads, params.num_kv_heads, params.head_dim, params.head_dim):
        raise ShapeError(
            f"{operation}: q has {got[0]} heads of size {got[2]} and k {got[1]} of size {got[3]}; expected "
            f"{params.num_heads} and {params.num_kv_heads} of size {params.head_dim}, as params say"
        )


def check_sinks(operation: str, sinks: torch.Tensor | None, params: AttentionParams) -> None:
    """Raises ShapeError unless there is one logit a head."""
    if sinks is not None and tuple(sinks.shape) != (params.num_heads,):
        raise ShapeError(
            f"{operation}: sinks {tuple(sinks.shape)}, expected one logit for each of the {params.num_heads} heads"
        )


def check_table(
    batch: int, block_table: Ints, context_lens: Ints | None, cache_shape: torch.Size
) -> tuple[IntArray, list[int]]:
    """The table as (B, max_blocks) and the lengths, every needed block and length within range. Pure."""
    num_blocks, block_size = cache_shape[:2]
    two_axes = np.ndim(block_table) == 2
    table = as_integers("paged_attention", "block_table", block_table, ndim=2 if two_axes else 1)
    table = table if two_axes else table[None]
    covered = table.shape[1] * block_size
    lengths = [covered] * batch
    if context_lens is not None:
        lengths = [int(length) for length in as_integers("paged_attention", "context_lens", context_lens)]
    if table.shape[0] != batch or len(lengths) != batch:
        raise ShapeError(
            f"paged_attention: {batch} sequences, block_table {table.shape}, {len(lengths)} context_lens; "
            "expected one row and one length for each sequence"
        )
    for b, length in enumerate(lengths):
        if not 0 <= length <= covered:
            raise BackendError(
                f"paged_attention: context_lens[{b}] is {length}, expected 0 <= length <= {covered}, the covered slots"
            )
        needed = table[b, : -(-length // block_size)] if length else table[b, :0]
        if needed.size and not 0 <= int(needed.min()) <= int(needed.max()) < num_blocks:
            bad = needed[(needed < 0) | (needed >= num_blocks)]
            raise BackendError(
                f"paged_attention: block_table[{b}] names block {int(bad[0])}, expected 0 <= block < {num_blocks}"
            )
    return table, lengths
