"""Attention of one new token a sequence, over keys and values in blocks, read sixteen bytes at a time.

A key is shared by 4, 8, 16 or 32 lanes (fewer for short heads), each with eight elements of it, so a warp takes one to
eight keys at once, and does so four times before it waits: eight loads are under way in each lane. Every warp has its
own runs of 32 keys; each lane looks up where one of them lies. Up to `shared` heads that share a kv head share what is
read; their softmax is online, its maximum renewed every four keys of a lane. Lanes, then warps, then, by
`attention.merge`, blocks of threads join what they have.

Source: Milakov and Gimelshein 2018, algorithm 3 (online softmax); Dao et al. 2023, "Flash-Decoding" (split keys).
Clauses: BK-NCUDA-44 (specs/backend_numba_cuda.md), KN-PAGED-1..7 (specs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, REAL, REALS, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.attention import NOTHING, ZERO, first_key, rescaling, with_sink
from ferrum_numba.gpu.kernels.packs import widening
from ferrum_numba.gpu.kernels.reduction import ALL_LANES, WARP, larger
from ferrum_numba.gpu.pack_math import dot, gathered, plus, scaled, spread
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.wide import PACK, fetch

WARPS = 4  # of a block
THREADS = WARPS * WARP
AT_ONCE = 4  # keys of a lane before the maximum is renewed
MOST_HEAD_DIM = WARP * PACK


def lanes_of(head_dim: int) -> int:
    """Lanes that share a key: the power of two, 4 at least, that has a pack each. Pure."""
    return max(WARP // PACK, 1 << (-(-head_dim // PACK) - 1).bit_length())


def shares_of(x: Storage) -> tuple[int, ...]:
    """How many heads may share what is read: one where a pack is two vectors, which leave no registers. Pure."""
    return (1,) if x.element.itemsize == 4 else (1, 2)


def shared_by(x: Storage, num_heads: int, num_kv_heads: int) -> int:
    """How many heads of a block share what is read. Pure."""
    return min(num_heads // num_kv_heads, shares_of(x)[-1])


def blocks_for(x: Storage, num_sequences: int, num_heads: int, num_kv_heads: int, num_splits: int) -> int:
    """Blocks: groups of heads, which read the same keys, then splits, then kv heads, then sequences. Pure."""
    groups = -(-(num_heads // num_kv_heads) // shared_by(x, num_heads, num_kv_heads))
    return num_splits * groups * num_kv_heads * num_sequences


def shared_bytes(x: Storage, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Dynamic shared memory of a block. Pure."""
    return 4 * WARPS * shared_by(x, num_heads, num_kv_heads) * head_dim


@device
def weight_of(score: Any, top: Any) -> Any:
    return ZERO if score == NOTHING else math.exp(score - top)


@device
def where(table: Any, first_block: int, key: int, stop: int, block_size: int) -> Any:
    """The slot of a key; any slot for one that is not there."""
    if key < stop:
        return table[first_block + key // block_size] * block_size + key % block_size
    return 0


def attend_one(x: Storage, shared: int) -> Kernel:
    """q (B, H, D), caches (blocks, block_size, G, D), table (B, max_blocks), lengths (B,), sinks (H,); all flat, on
    16-byte addresses, D a multiple of 8. `lanes` is lanes_of(D).

    With one split the result goes to target; else every split leaves D sums, their weight and their maximum in `parts`.
    """
    store, widen = x.store, widening(x)
    all_rows, all_numbers, all_scores = WARPS * shared, shared * PACK, AT_ONCE * shared
    score_each, mix_each = _each(shared)

    @kernel(
        *(x.array, x.array, x.array, INTEGERS, INTEGERS, REALS, x.array, REALS),
        *(INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER),
        *(REAL, REAL, INTEGER, INTEGER, INTEGER),
    )
    def attend_one(
        q: Any,
        k_cache: Any,
        v_cache: Any,
        table: Any,
        lengths: Any,
        sinks: Any,
        target: Any,
        parts: Any,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        lanes: int,
        block_size: int,
        max_blocks: int,
        num_splits: int,
        split_keys: int,
        scale: Any,
        softcap: Any,
        causal: int,
        window: int,
        has_sinks: int,
    ) -> None:
        warp_tops, warp_totals = cuda.shared.array(all_rows, np.float32), cuda.shared.array(all_rows, np.float32)
        rows = cuda.shared.array(0, np.float32)  # (WARPS, shared, head_dim)
        queries = cuda.local.array(all_numbers, np.float32)
        mixed = cuda.local.array(all_numbers, np.float32)
        scores = cuda.local.array(all_scores, np.float32)
        tops, totals = cuda.local.array(shared, np.float32), cuda.local.array(shared, np.float32)
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        ratio = num_heads // num_kv_heads
        groups = (ratio + shared - 1) // shared
        base, rest = cuda.blockIdx.x % groups * shared, cuda.blockIdx.x // groups
        split, pair = rest % num_splits, rest // num_splits
        batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
        here, first_head = min(shared, ratio - base), kv_head * ratio + base
        length, first_block = lengths[batch], batch * max_blocks
        start = max(first_key(length - 1, causal, window), split * split_keys)
        stop = min(length, (split + 1) * split_keys)
        column, place, together = lane % lanes * PACK, lane // lanes, WARP // lanes
        for h in range(shared):
            query = batch * num_heads + first_head + min(h, here - 1)
            spread(widen(fetch(q, query * head_dim, column, head_dim)), queries, h * PACK)
            tops[h], totals[h] = NOTHING, ZERO
        for i in range(all_numbers):
            mixed[i] = ZERO
        run = start + warp * WARP
        while run < stop:
            slot = where(table, first_block, run + lane, stop, block_size)
            row = (slot * num_kv_heads + kv_head) * head_dim
            key = run
            while key < min(run + WARP, stop):
                own = key - run + place
                row0, row1 = (
                    cuda.shfl_sync(ALL_LANES, row, own),
                    cuda.shfl_sync(ALL_LANES, row, own + together),
                )
                row2, row3 = (
                    cuda.shfl_sync(ALL_LANES, row, own + 2 * together),
                    cuda.shfl_sync(ALL_LANES, row, own + 3 * together),
                )
                left = stop - key - place
                end0 = head_dim if left > 0 else 0
                end1 = head_dim if left > together else 0
                end2 = head_dim if left > 2 * together else 0
                end3 = head_dim if left > 3 * together else 0
                k0, k1 = fetch(k_cache, row0, column, end0), fetch(k_cache, row1, column, end1)
                k2, k3 = fetch(k_cache, row2, column, end2), fetch(k_cache, row3, column, end3)
                v0, v1 = fetch(v_cache, row0, column, end0), fetch(v_cache, row1, column, end1)
                v2, v3 = fetch(v_cache, row2, column, end2), fetch(v_cache, row3, column, end3)
                score_each(widen(k0), queries, scores, 0)
                score_each(widen(k1), queries, scores, shared)
                score_each(widen(k2), queries, scores, 2 * shared)
                score_each(widen(k3), queries, scores, 3 * shared)
                step = lanes // 2
                while step > 0:
                    for i in range(all_scores):
                        scores[i] += cuda.shfl_xor_sync(ALL_LANES, scores[i], step)
                    step //= 2
                for h in range(shared):
                    top = tops[h]
                    for k in range(AT_ONCE):
                        score = scores[k * shared + h] * scale
                        if softcap > ZERO:
                            score = softcap * math.tanh(score / softcap)
                        if left <= k * together:
                            score = NOTHING
                        scores[k * shared + h] = score
                        top = larger(top, score)  # a NaN reaches the sum, not the maximum
                    factor = rescaling(tops[h], top)
                    total = totals[h] * factor
                    for k in range(AT_ONCE):
                        weight = weight_of(scores[k * shared + h], top)
                        scores[k * shared + h] = weight
                        total += weight
                    tops[h], totals[h] = top, total
                    spread(scaled(gathered(mixed, h * PACK), factor), mixed, h * PACK)
                mix_each(widen(v0), scores, mixed, 0)
                mix_each(widen(v1), scores, mixed, shared)
                mix_each(widen(v2), scores, mixed, 2 * shared)
                mix_each(widen(v3), scores, mixed, 3 * shared)
                key += AT_ONCE * together
            run += WARPS * WARP
        for h in range(shared):  # over the keys of a warp
            top, step = tops[h], lanes
            while step < WARP:
                top = larger(top, cuda.shfl_xor_sync(ALL_LANES, top, step))
                step *= 2
            factor = rescaling(tops[h], top)
            total, step = totals[h] * factor, lanes
            spread(scaled(gathered(mixed, h * PACK), factor), mixed, h * PACK)
            while step < WARP:
                total += cuda.shfl_xor_sync(ALL_LANES, total, step)
                for i in range(PACK):
                    mixed[h * PACK + i] += cuda.shfl_xor_sync(ALL_LANES, mixed[h * PACK + i], step)
                step *= 2
            if place == 0 and column < head_dim:
                for i in range(PACK):
                    rows[(warp * shared + h) * head_dim + column + i] = mixed[h * PACK + i]
            if lane == 0:
                warp_tops[warp * shared + h], warp_totals[warp * shared + h] = top, total
        cuda.syncthreads()
        for h in range(here):  # over the warps of a block
            top, total = warp_tops[h], ZERO
            for other in range(1, WARPS):
                top = larger(top, warp_tops[other * shared + h])
            for other in range(WARPS):
                total += warp_totals[other * shared + h] * rescaling(warp_tops[other * shared + h], top)
            query, share, weight = batch * num_heads + first_head + h, np.float32(1.0), total
            if has_sinks != 0:
                share, weight = with_sink(top, total, sinks[first_head + h])
            part = (query * num_splits + split) * (head_dim + 2)
            for d in range(cuda.threadIdx.x, head_dim, WARPS * WARP):
                value = ZERO
                for other in range(WARPS):
                    factor = rescaling(warp_tops[other * shared + h], top)
                    value += rows[(other * shared + h) * head_dim + d] * factor
                if num_splits == 1:
                    store(target, query * head_dim + d, value * share / weight if length > 0 else ZERO)
                else:
                    parts[part + d] = value
            if num_splits > 1 and cuda.threadIdx.x == 0:
                parts[part + head_dim], parts[part + head_dim + 1] = total, top

    return attend_one


def _each(shared: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """What a lane does with a key, and with a value, for every head."""

    @device
    def score_each(key: Any, queries: Any, scores: Any, first: int) -> None:
        for h in range(shared):
            scores[first + h] = dot(gathered(queries, h * PACK), key, ZERO)

    @device
    def mix_each(value: Any, weights: Any, mixed: Any, first: int) -> None:
        for h in range(shared):
            spread(plus(gathered(mixed, h * PACK), scaled(value, weights[first + h])), mixed, h * PACK)

    return score_each, mix_each
