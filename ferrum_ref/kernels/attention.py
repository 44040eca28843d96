"""Attention over contiguous keys and values, and over keys and values that lie in blocks.

Clauses: KN-ATTN-1..8, KN-ATTN-10..12, KN-PAGED-1..8.
Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023 (GQA);
blocks: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.kernels.integers import as_integers
from ferrum_ref.kernels.rounding import Array, DType, compute_dtype, round_to, widen

_QUERY_ROWS = 64  # queries taken at a time: a causal block skips the keys ahead of its last row
_SCORE_ELEMENTS = 1 << 22  # and fewer where their scores would pass 16 MB of float32
_FEW_ROWS = 32  # at most so many query rows a head: a matmul per short run of keys beats one long matmul
_KEY_RUN = 16


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    causal: bool = False,
    sliding_window: int = 0,
    *,
    softcap: float = 0.0,
    sinks: Array | None = None,
) -> Array:
    """o_i = sum_j p_ij v_j,  p_i = softmax over the visible j of s_ij = scale q_i . k_j          [KN-ATTN-1..12]

    q (B, Sq, H, D); k (B, Skv, G, D); v (B, Skv, G, Dv); H a multiple of G; result (B, Sq, H, Dv) in q's type.
    Query head h reads kv head h // (H/G). scale None is 1/sqrt(D). Query i sits at position Skv - Sq + i; causal: it
    sees keys j <= its position; sliding_window w > 0 (causal only): and j > its position - w. A query that sees no key
    gives zeros. softcap c > 0: s_ij is c tanh(scale q_i . k_j / c). sinks (H,): head h's softmax has one more entry,
    of logit sinks[h], whose share goes to nothing. Scores, softmax and sums in float32 at least; probabilities are
    not rounded in between. Pure.
    Raises ShapeError for other shapes; BackendError for a window without causal or a cap below 0.
    """
    dtype = compute_dtype("attention", q, k, v)
    _check_shapes(q, k, v)
    extra = None if sinks is None else _sink_logits(sinks, q.shape[2], k.shape[2], dtype)
    if not 0.0 <= softcap < math.inf:
        raise BackendError(f"attention: softcap is {softcap}, expected 0 (off) or a finite cap above")
    if sliding_window and (sliding_window < 0 or not causal):
        raise BackendError(
            f"attention: sliding_window={sliding_window} with causal={causal}; expected 0, or positive with causal=True"
        )
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, value_dim = k.shape[1], v.shape[3]
    factor = dtype.type(1.0 / math.sqrt(head_dim) if scale is None else scale)
    out = np.empty((batch, num_queries, num_heads, value_dim), q.dtype)
    first = max(0, num_queries - num_keys) if causal else 0 if num_keys else num_queries
    if first:
        out[:, :first] = 0
    if first == num_queries or out.size == 0:
        return out
    rows = max(1, min(_QUERY_ROWS, _SCORE_ELEMENTS // (batch * num_heads * num_keys)))
    k, v = widen(k, dtype), widen(v, dtype)
    with np.errstate(all="ignore"):
        for start in range(first, num_queries, rows):
            stop = min(start + rows, num_queries)
            low, high = 0, num_keys
            if causal:
                high = num_keys - num_queries + stop
                if sliding_window:
                    low = max(0, num_keys - num_queries + start - sliding_window + 1)
            queries = widen(q[:, start:stop], dtype)
            block = _attend(
                queries, k[:, low:high], v[:, low:high], factor, causal, sliding_window, dtype.type(softcap), extra
            )
            out[:, start:stop] = round_to(block, out.dtype)
    return out


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Sequence[int] | Array,
    context_lens: Sequence[int] | Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    *,
    softcap: float = 0.0,
    sinks: Array | None = None,
) -> Array:
    """Attention of T new tokens a sequence over keys and values that lie in blocks          [KN-PAGED-1..8]

    Position p of sequence b lies in block block_table[b, p // block_size], row p % block_size. q (B, H, D) for T = 1 or
    (B, T, H, D); caches (num_blocks, block_size, G, D); block_table (B, max_blocks), or flat for B = 1;
    context_lens (B,) counts the valid positions, the T new ones included; None: every slot that the table covers.
    Query t sits at position context_lens[b] - T + t and sees what `attention` says. Slots at or beyond
    context_lens[b] are never read, and no table entry beyond the last needed one. Result has q's shape and type. Pure.
    Raises ShapeError for other shapes; BackendError for a length or a block out of range.
    """
    compute_dtype("paged_attention", q, k_cache, v_cache)
    if q.ndim not in (3, 4) or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise ShapeError(
            f"paged_attention: q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}; "
            "expected (B, [T,] H, D) and two equal caches (num_blocks, block_size, G, D)"
        )
    queries = q[:, None] if q.ndim == 3 else q
    table, lengths = _check_table(queries.shape[0], block_table, context_lens, k_cache.shape)
    out = np.empty(queries.shape, q.dtype)
    for b, length in enumerate(lengths):
        blocks = table[b, : -(-length // k_cache.shape[1])]
        k, v = gather_blocks(k_cache, blocks, length), gather_blocks(v_cache, blocks, length)
        out[b] = attention(
            queries[b : b + 1], k[None], v[None], scale, causal, sliding_window, softcap=softcap, sinks=sinks
        )[0]
    return out.reshape(q.shape)


def gather_blocks(cache: Array, blocks: Array, num_positions: int) -> Array:
    """The first `num_positions` rows of the blocks, in order: (num_positions, G, D)          [KN-PAGED-2]

    cache (num_blocks, block_size, G, D); a view where the blocks follow one another in the cache, else a copy.
    """
    if not num_positions:
        return cache[:0].reshape(0, *cache.shape[2:])
    first, count = int(blocks[0]), blocks.shape[0]
    if int(blocks[-1]) - first == count - 1 and (count < 3 or bool((blocks[1:] - blocks[:-1] == 1).all())):
        picked = cache[first : first + count]
    else:
        picked = cache[blocks]
    return picked.reshape(count * cache.shape[1], *cache.shape[2:])[:num_positions]


def _attend(
    q: Array,
    k: Array,
    v: Array,
    factor: np.generic,
    causal: bool,
    window: int,
    softcap: np.generic,
    sinks: Array | None,
) -> Array:
    """One block of queries, the last of which sees all of k up to its end."""
    batch, num_rows, num_heads, head_dim = q.shape
    num_keys, num_groups = k.shape[1], k.shape[2]
    ratio = num_heads // num_groups
    # Rows of one kv head together: (B, G, rows * H/G, D). K and V are never repeated or copied.
    grouped = q.reshape(batch, num_rows, num_groups, ratio, head_dim).swapaxes(1, 2)
    scores = _scores(grouped.reshape(batch, num_groups, num_rows * ratio, head_dim), k)
    scores *= factor
    if softcap:
        scores /= softcap
        np.tanh(scores, out=scores)
        scores *= softcap
    if causal and num_rows > 1:
        by_row = scores.reshape((batch, num_groups, num_rows, ratio, num_keys), copy=False)
        _mask_future(by_row[..., 1 - num_rows :])
        if window:
            _mask_past(by_row, window)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        beside = np.tile(sinks, (num_rows, 1))[None]  # (1, G, rows * H/G, 1), in the order of the score rows
        top = np.maximum(top, beside)
    scores -= top
    np.exp(scores, out=scores)
    total = np.add.reduce(scores, axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(beside - top)
    mixed = np.matmul(scores, v.swapaxes(1, 2))
    mixed /= total
    value_dim = v.shape[3]
    mixed = mixed.reshape(batch, num_groups, num_rows, ratio, value_dim).swapaxes(1, 2)
    return np.asarray(mixed.reshape(batch, num_rows, num_heads, value_dim))


def _scores(q: Array, k: Array) -> Array:
    """q (B, G, M, D) times k (B, S, G, D) -> (B, G, M, S)."""
    batch, groups, rows, head_dim = q.shape
    num_keys = k.shape[1]
    by_head = k.transpose(0, 2, 3, 1)
    out = np.empty((batch, groups, rows, num_keys), q.dtype)
    if rows > _FEW_ROWS or num_keys < 16 * _KEY_RUN:
        np.matmul(q, by_head, out=out)
        return out
    runs, rest = divmod(num_keys, _KEY_RUN)
    whole = num_keys - rest
    split = k[:, :whole].reshape((batch, runs, _KEY_RUN, groups, head_dim))
    target = out[..., :whole].reshape((batch, groups, rows, runs, _KEY_RUN), copy=False)
    np.matmul(q[:, None], split.transpose(0, 1, 3, 4, 2), out=target.transpose(0, 3, 1, 2, 4))
    if rest:
        np.matmul(q, by_head[..., whole:], out=out[..., whole:])
    return out


def _sink_logits(sinks: Array, num_heads: int, num_groups: int, dtype: DType) -> Array:
    """(G, H/G, 1), widened.  Raises ShapeError unless there is one logit a head."""
    compute_dtype("attention", sinks)
    if sinks.shape != (num_heads,):
        raise ShapeError(f"attention: sinks {sinks.shape}, expected one logit for each of the {num_heads} heads")
    return widen(sinks, dtype).reshape(num_groups, num_heads // num_groups, 1)


def _mask_future(scores: Array) -> None:
    """-inf where key column c of the last rows-1 lies ahead of row r: c >= r. scores (B, G, rows, H/G, rows-1)."""
    num_rows = scores.shape[2]
    ahead = np.arange(num_rows - 1) >= np.arange(num_rows)[:, None]
    np.copyto(scores, -np.inf, where=ahead[:, None, :])


def _mask_past(scores: Array, window: int) -> None:
    """-inf where a key lies `window` or more positions before its row; the last row sits on the last key."""
    num_rows, num_keys = scores.shape[2], scores.shape[4]
    position = np.arange(num_keys - num_rows, num_keys)[:, None]
    np.copyto(scores, -np.inf, where=(np.arange(num_keys) <= position - window)[:, None, :])


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or v.ndim != 4
        or k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or not k.shape[2]
        or q.shape[2] % k.shape[2]
    ):
        raise ShapeError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; "
            "expected (B, Sq, H, D), (B, Skv, G, D), (B, Skv, G, D) with H a multiple of G"
        )


def _check_table(
    batch: int,
    block_table: Sequence[int] | Array,
    context_lens: Sequence[int] | Array | None,
    cache_shape: tuple[int, ...],
) -> tuple[Array, list[int]]:
    num_blocks, block_size = cache_shape[:2]
    table = as_integers("paged_attention", "block_table", block_table, None)
    if table.ndim == 1:
        table = table[None]
    covered = table.shape[-1] * block_size
    if context_lens is None:
        lengths = [covered] * batch
    else:
        lengths = as_integers("paged_attention", "context_lens", context_lens).tolist()
    if table.ndim != 2 or table.shape[0] != batch or len(lengths) != batch:
        raise ShapeError(
            f"paged_attention: {batch} sequences, block_table {table.shape}, {len(lengths)} context_lens; "
            "expected one row and one length for each sequence"
        )
    for b, length in enumerate(lengths):
        if not 0 <= length <= covered:
            raise BackendError(
                f"paged_attention: context_lens[{b}] is {length}, expected 0 <= length <= {covered}, the covered slots"
            )
        needed = table[b, : -(-length // block_size)]
        if needed.size and (needed.min() < 0 or needed.max() >= num_blocks):
            bad = int(needed.min()) if needed.min() < 0 else int(needed.max())
            raise BackendError(
                f"paged_attention: block_table[{b}] names block {bad}, expected 0 <= block < {num_blocks}"
            )
    return table, lengths
