"""Attention of many queries: scores and mixtures are BLAS's products, what lies between them is one kernel.

Queries are taken QUERIES_AT_A_TIME at a time, so that a causal block leaves out the keys ahead of its last row, and
fewer where their scores would pass SCORES_AT_A_TIME. The heads that share a kv head are the rows of one product.
Clauses: BK-NCPU-10..11 (specs/backend_numba.md), KN-ATTN-*, KN-PAGED-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of, floats_at
from ferrum_numba.cpu.attending import first_visible, weigh
from ferrum_numba.cpu.compiled import serial_kernel
from ferrum_numba.cpu.conversion import FLOAT32, run_of, widen
from ferrum_numba.cpu.floats import exp32
from ferrum_ref.interfaces.kernel_ops import AttentionParams

Array = NDArray[Any]
Float32 = NDArray[np.float32]

QUERIES_AT_A_TIME: Final = 64
SCORES_AT_A_TIME: Final = 1 << 22  # elements: 16 MB
FEWEST_QUERIES: Final = 16  # worth a product each: rather than take fewer, take fewer kv heads at a time


def prefill(
    q: Float32, k: Array, v: Array, blocks: Array, length: int, params: AttentionParams, sinks: Array | None, out: Array
) -> None:
    """o_i = sum_j p_ij v_j over the first `length` positions of the blocks, of which the last T are q's own.

    q (T, H, D) and out (T, H, Dv) float32, contiguous; k (num_blocks, block_size, G, D) and v (.., Dv) of any float;
    sinks (H,) float32. Writes out.
    """
    tokens, heads, _ = q.shape
    num_groups, size = v.shape[2:]
    first = max(0, tokens - length) if params.causal else 0 if length else tokens
    out[:first] = 0.0
    if first == tokens or not out.size:
        return
    ratio, window = heads // num_groups, params.sliding_window
    groups_at_a_time = min(num_groups, max(1, SCORES_AT_A_TIME // (FEWEST_QUERIES * ratio * length)))
    rows = min(QUERIES_AT_A_TIME, max(1, SCORES_AT_A_TIME // (groups_at_a_time * ratio * length)))
    for group in range(0, num_groups, groups_at_a_time):
        groups = slice(group, min(num_groups, group + groups_at_a_time))
        keys, values = (gathered(cache, blocks, length, groups) for cache in (k, v))
        count = keys.shape[1]
        for start in range(first, tokens, rows):
            stop = min(tokens, start + rows)
            own = length - tokens + start  # the position of the first of these queries
            low, high = 0, length
            if params.causal:
                low, high = max(0, own - window + 1) if window else 0, own + stop - start
            some = q[start:stop, groups.start * ratio : groups.stop * ratio]
            some = some.reshape(stop - start, count, ratio, q.shape[2]).swapaxes(0, 1)
            with np.errstate(all="ignore"):
                scores = np.matmul(some.reshape(count, -1, q.shape[2]), keys[low:high].transpose(1, 2, 0))
                sums = np.empty((2, *scores.shape[:2]), FLOAT32)
                weigh_rows(
                    *(address_of(scores), address_of(sums), count, stop - start, ratio, high - low),
                    *(own - low, int(params.causal), window, params.softmax_scale, params.logit_softcap),
                )
                mixed = np.matmul(scores, values[low:high].swapaxes(0, 1))
            finish_rows(
                *(address_of(mixed), address_of(sums), 0 if sinks is None else address_of(sinks) + 4 * group * ratio),
                address_of(out) + 4 * (start * heads + group * ratio) * size,
                *(count, stop - start, ratio, size, heads),
            )


def gathered(cache: Array, blocks: Array, length: int, groups: slice) -> Float32:
    """The first `length` rows of the blocks for some kv heads, (length, g, D) float32; a view where that will do.

    cache (num_blocks, block_size, G, D). Pure.
    """
    first, count = int(blocks[0]), len(blocks)
    if count == 1 or bool((np.diff(blocks) == 1).all()):
        picked = cache[first : first + count, :, groups]
    else:
        picked = cache[blocks][:, :, groups]
    rows = picked.reshape(count * cache.shape[1], *picked.shape[2:])[:length]
    return rows if rows.dtype == FLOAT32 else widen(run_of(rows), "attention")


@serial_kernel
def weigh_rows(scores, sums, groups, tokens, ratio, count, offset, causal, window, scale, cap):
    """Scores (g, T, H/G, count), in place, to exp(scale score - m), m the row's largest; 0 where key j is out of sight.

    Query t sits at position offset + t, key j at position j. sums (2, g, T, H/G): m, then the sum of the exponentials.
    """
    num_rows = groups * tokens * ratio
    found = floats_at(sums, 2 * num_rows)
    for index in range(num_rows):
        position = offset + index // ratio % tokens
        low = first_visible(position, window) if causal else 0
        high = min(count, position + 1) if causal else count
        row = floats_at(scores + 4 * index * count, count)
        row[:low] = np.float32(0.0)
        row[high:] = np.float32(0.0)
        highest, total = weigh(row[low:high], high - low, np.float32(scale), np.float32(cap))
        found[index], found[num_rows + index] = highest, total


@serial_kernel
def finish_rows(mixed, sums, sinks, out, groups, tokens, ratio, size, heads):
    """out[t, h] = mixed / sum, the exponential of the head's sink added to the sum where `sinks` is not 0.

    mixed (g, T, H/G, Dv); out: address of the first token's first head of these, tokens `heads` heads apart.
    """
    num_rows = groups * tokens * ratio
    found = floats_at(sums, 2 * num_rows)
    for index in range(num_rows):
        head, token = index // (tokens * ratio) * ratio + index % ratio, index // ratio % tokens
        row = floats_at(mixed + 4 * index * size, size)
        target = floats_at(out + 4 * (token * heads + head) * size, size)
        total, factor = found[num_rows + index], np.float32(1.0)
        if sinks:
            sink = floats_at(sinks + 4 * head, 1)[0]
            highest = found[index] if found[index] > sink else sink
            factor = exp32(found[index] - highest)
            total = total * factor + exp32(sink - highest)
        for i in range(size):
            target[i] = row[i] * factor / total
