"""Attention over keys and values in blocks, with an online softmax; prefill and decode, contiguous and paged.

A block of threads has eight queries that share a kv head (several heads of one token, or tokens of one head), one in
each warp, and goes through the keys 32 at a time: scores by lanes, maximum and sum by butterfly, then the values. Keys
and values come through shared memory in slices of 32 elements of a head, so any head size fits. Contiguous keys are
one block a sequence. Long contexts of few queries are split among blocks of threads, whose parts `merge` joins.

Source: Milakov and Gimelshein 2018, algorithm 3 (online softmax); Dao et al. 2023, "Flash-Decoding" (split keys).
Clauses: BK-NCUDA-16 (specs/backend_numba_cuda.md), KN-ATTN-1..8, KN-PAGED-1..7 (specs/kernels.md).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, REAL, REALS, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.reduction import warp_max, warp_sum
from ferrum_numba.gpu.storage import Storage

ROWS = 8  # queries of a block of threads: its warps
KEYS = 32  # keys at a time: the lanes of a warp
SLICE = 32  # elements of a head at a time
PADDED = SLICE + 1
NOTHING = np.float32(-math.inf)
ZERO = np.float32(0.0)


@device
def first_key(position: int, causal: int, window: int) -> int:
    """The lowest key that a query at `position` sees."""
    return max(0, position - window + 1) if causal != 0 and window > 0 else 0


@device
def end_of_keys(position: int, length: int, causal: int) -> int:
    """One past the highest key that a query at `position` sees; 0 or less if it sees none."""
    return position + 1 if causal != 0 else length


@device
def rescaling(old: Any, new: Any) -> Any:
    """What weighs exp(s - old) into exp(s - new), new >= old; 0 where there was nothing before."""
    return ZERO if old == NOTHING else math.exp(old - new)


@device
def with_sink(top: Any, total: Any, sink: Any) -> Any:
    """(factor, total) once a logit that attends to nothing has joined the softmax."""
    joint = sink if sink > top else top
    factor = rescaling(top, joint)
    return factor, total * factor + math.exp(sink - joint)


def attention(x: Storage) -> Kernel:
    """q (B, T, H, D), caches (blocks, block_size, G, D), table (B, max_blocks), lengths (B,), sinks (H,); all flat.

    blockIdx.x counts tiles of ROWS queries, then splits, then kv heads, then sequences. With one split the result goes
    to target; else every split leaves D sums, their weight and their maximum in `parts`.
    """
    load, store = x.load, x.store

    @kernel(
        *(x.array, x.array, x.array, INTEGERS, INTEGERS, REALS, x.array, REALS),
        *(INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER),
        *(REAL, REAL, INTEGER, INTEGER, INTEGER),
    )
    def attention(
        q: Any,
        k_cache: Any,
        v_cache: Any,
        table: Any,
        lengths: Any,
        sinks: Any,
        target: Any,
        parts: Any,
        num_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
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
        q_slice = cuda.shared.array((ROWS, PADDED), np.float32)
        kv_slice = cuda.shared.array((KEYS, PADDED), np.float32)
        weights = cuda.shared.array((ROWS, KEYS), np.float32)
        slots = cuda.shared.array(KEYS, np.int64)
        sums = cuda.shared.array(0, np.float32)  # (ROWS, head_dim)
        thread = cuda.threadIdx.x
        warp, lane = thread // KEYS, thread % KEYS
        ratio = num_heads // num_kv_heads
        num_rows = num_tokens * ratio
        num_tiles = (num_rows + ROWS - 1) // ROWS
        tile = cuda.blockIdx.x % num_tiles
        split = cuda.blockIdx.x // num_tiles % num_splits
        pair = cuda.blockIdx.x // num_tiles // num_splits
        batch, group = pair // num_kv_heads, pair % num_kv_heads
        length = lengths[batch]
        before = length - num_tokens  # position of token 0
        row = tile * ROWS + warp
        is_row = row < num_rows
        token, head = row // ratio, group * ratio + row % ratio
        query = (batch * num_tokens + token) * num_heads + head
        low = first_key(before + token, causal, window)
        high = end_of_keys(before + token, length, causal) if is_row else 0
        last_token = (min(tile * ROWS + ROWS, num_rows) - 1) // ratio
        start = max(first_key(before + tile * ROWS // ratio, causal, window), split * split_keys)
        stop = min(end_of_keys(before + last_token, length, causal), (split + 1) * split_keys)
        for d in range(lane, head_dim, SLICE):
            sums[warp * head_dim + d] = ZERO
        top, total = NOTHING, ZERO
        for first in range(start, stop, KEYS):
            num_keys = min(KEYS, stop - first)
            if thread < num_keys:
                key = first + thread
                slots[thread] = table[batch * max_blocks + key // block_size] * block_size + key % block_size
            cuda.syncthreads()
            is_seen = low <= first + lane and first + lane < high and lane < num_keys
            score = ZERO
            for base in range(0, head_dim, SLICE):
                width = min(SLICE, head_dim - base)
                if lane < width:
                    if is_row:
                        q_slice[warp, lane] = load(q, query * head_dim + base + lane)
                    for key in range(warp, num_keys, ROWS):
                        kv_slice[key, lane] = load(
                            k_cache, (slots[key] * num_kv_heads + group) * head_dim + base + lane
                        )
                cuda.syncthreads()
                if is_seen:
                    for d in range(width):
                        score += q_slice[warp, d] * kv_slice[lane, d]
                cuda.syncthreads()
            score *= scale
            if softcap > ZERO:
                score = softcap * math.tanh(score / softcap)
            if not is_seen:
                score = NOTHING
            higher = warp_max(score if score == score else NOTHING)  # a NaN reaches the sum, not the maximum
            higher = top if top > higher else higher
            weight = ZERO if score == NOTHING else math.exp(score - higher)
            factor = rescaling(top, higher)
            total = total * factor + warp_sum(weight)
            top = higher
            weights[warp, lane] = weight
            for base in range(0, head_dim, SLICE):
                width = min(SLICE, head_dim - base)
                if lane < width:
                    for key in range(warp, num_keys, ROWS):
                        kv_slice[key, lane] = load(
                            v_cache, (slots[key] * num_kv_heads + group) * head_dim + base + lane
                        )
                cuda.syncthreads()
                if lane < width:
                    value = sums[warp * head_dim + base + lane] * factor
                    for key in range(max(0, low - first), min(num_keys, high - first)):
                        value += weights[warp, key] * kv_slice[key, lane]
                    sums[warp * head_dim + base + lane] = value
                cuda.syncthreads()
        if is_row and num_splits == 1:
            share = np.float32(1.0)
            if has_sinks != 0:
                share, total = with_sink(top, total, sinks[head])
            for d in range(lane, head_dim, SLICE):
                value = sums[warp * head_dim + d] * share / total if high > low else ZERO
                store(target, query * head_dim + d, value)
        elif is_row:
            part = (query * num_splits + split) * (head_dim + 2)
            for d in range(lane, head_dim, SLICE):
                parts[part + d] = sums[warp * head_dim + d]
            if lane == 0:
                parts[part + head_dim] = total
                parts[part + head_dim + 1] = top

    return attention


def merge(x: Storage) -> Kernel:
    """Joins the splits of each query: o = sum_s w_s o_s / sum_s w_s l_s, w_s = exp(m_s - max m)."""
    store = x.store

    @kernel(
        *(REALS, INTEGERS, REALS, x.array),
        *(INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER),
    )
    def merge(
        parts: Any,
        lengths: Any,
        sinks: Any,
        target: Any,
        num_tokens: int,
        num_heads: int,
        head_dim: int,
        num_splits: int,
        causal: int,
        window: int,
        has_sinks: int,
    ) -> None:
        query = cuda.blockIdx.x
        token = query // num_heads % num_tokens
        length = lengths[query // num_heads // num_tokens]
        position = length - num_tokens + token
        first_part = query * num_splits * (head_dim + 2) + head_dim
        top, total = NOTHING, ZERO
        for split in range(num_splits):
            split_top = parts[first_part + split * (head_dim + 2) + 1]
            top = split_top if split_top > top else top
        for split in range(num_splits):
            split_part = first_part + split * (head_dim + 2)
            total += parts[split_part] * rescaling(parts[split_part + 1], top)
        share = np.float32(1.0)
        if has_sinks != 0:
            share, total = with_sink(top, total, sinks[query % num_heads])
        is_blind = end_of_keys(position, length, causal) <= first_key(position, causal, window)
        for d in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
            value = ZERO
            for split in range(num_splits):
                split_part = first_part + split * (head_dim + 2)
                value += parts[split_part - head_dim + d] * rescaling(parts[split_part + 1], top)
            store(target, query * head_dim + d, ZERO if is_blind else value * share / total)

    return merge
