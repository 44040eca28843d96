"""Attention of a few queries over keys and values that lie in blocks; contiguous ones are one block a sequence.

Keys are taken KEYS_AT_A_TIME at a time. Such a part of a sequence gives, for each query row and head, the largest score
m, the sum l of exp(score - m), and the sum o of exp(score - m) v. Parts are computed by different threads (split-KV)
and joined in order of their keys. Many queries are `prefill`'s.
Clauses: BK-NCPU-10..11 (specs/backend_numba.md), KN-ATTN-*, KN-PAGED-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import call, floats_at, integers_at, keep
from ferrum_numba.cpu.compiled import device, ordered, parallel_kernel, routine
from ferrum_numba.cpu.floats import element_bytes, exp32, tanh32, widened
from ferrum_numba.cpu.vector import (
    F32,
    ROWS,
    add_weighted_rows,
    add_weighted_rows_2,
    add_weighted_rows_4,
    dot_f32,
    dots_f32,
    fetch_rows,
    largest,
)

KEYS_AT_A_TIME = 512
SMALLEST_PARALLEL = 200_000  # products of q and k that are worth more than one thread
RUN = 64  # rows worked on together, at most


@device
def run_end(position, end, block_size):
    """Behind the last of the positions from `position` on that lie one behind another, and are worked on together."""
    return min(end, (position // block_size + 1) * block_size, position + RUN)


@device
def row_address(position, base, table, block_size, row_bytes):
    return base + (table[position // block_size] * block_size + position % block_size) * row_bytes


@device
def rows_from(position, stop, end, base, table, block_size, row_bytes, kind, size, scratch):
    """(address, stride in bytes) of the float32 rows position .. stop - 1, widened into `scratch` if need be.

    Asks for those that follow, up to `end`, to be in cache next time.
    """
    address = row_address(position, base, table, block_size, row_bytes)
    if stop < end:
        following = row_address(stop, base, table, block_size, row_bytes)
        fetch_rows(following, row_bytes, run_end(stop, end, block_size) - stop, size * element_bytes(kind))
    if kind == F32:
        return address, row_bytes
    for row in range(stop - position):
        widened(address + row * row_bytes, kind, size, scratch[row * size : (row + 1) * size])
    return scratch.ctypes.data, 4 * size


@device
def score_rows(q, keys, stride, count, size, out):
    """out[j] = q . key j for `count` keys."""
    several = max(0, count) // ROWS * ROWS
    for j in range(0, several, ROWS):
        dots_f32(keys + j * stride, stride, q, size, out + 4 * j)
    for j in range(several, count):
        dot_f32(keys + j * stride, stride, q, size, out + 4 * j)


@ordered
def capped(score, cap):
    return cap * tanh32(score / cap)


@device
def weigh(scores, count, scale, cap):
    """Scores to exp(scale score - m), in place: (m, their sum). Scores of -inf only give m = -inf and the sum 0."""
    for j in range(count):
        scores[j] = scores[j] * scale
    if cap > np.float32(0.0):
        for j in range(count):
            scores[j] = capped(scores[j], cap)
    highest = largest(scores.ctypes.data, count)
    taken = np.float32(0.0) if highest == np.float32(-np.inf) else highest
    for j in range(count):
        scores[j] = exp32(scores[j] - taken)
    total = np.float32(0.0)
    for j in range(count):
        total += scores[j]
    return highest, total


@device
def first_visible(position, window):
    return max(0, position - window + 1) if window else 0


@device
def mix_rows(factors, rows, stride, count, size, out, ratio):
    """Every head's weighted sum of the rows, several heads at a time, which share the loads of a row."""
    head, step, width = 0, 4 * KEYS_AT_A_TIME, 4 * (size + 2)
    while head + 4 <= ratio:
        add_weighted_rows_4(factors + head * step, step, rows, stride, count, size, out + head * width, width)
        head += 4
    if head + 2 <= ratio:
        add_weighted_rows_2(factors + head * step, step, rows, stride, count, size, out + head * width, width)
        head += 2
    if head < ratio:
        add_weighted_rows(factors + head * step, step, rows, stride, count, size, out + head * width, width)


@routine(integers=21, floats=2)
def attend_keys(
    q, q_step, t_start, t_stop, ratio, size, k, v, table, block_size, k_row_bytes, v_row_bytes, v_size, kind,
    start, stop, offset, causal, window, out, out_step, scale, cap,
):  # fmt: skip
    """The keys start .. stop - 1 of one kv head, seen by its `ratio` query heads of the tokens t_start .. t_stop - 1.

    q: address of the first head of token 0, tokens `q_step` bytes apart, heads one behind another. Token t sits at
    position offset + t. table: address of the numbers of the blocks. out: address of m, l and o of token t_start's
    first head, tokens `out_step` bytes apart.
    """
    scores = np.empty((t_stop - t_start) * ratio * KEYS_AT_A_TIME, np.float32)
    scratch = np.empty(RUN * max(size, v_size) if kind != F32 else 1, np.float32)
    place, width = scores.ctypes.data, 4 * (v_size + 2)
    blocks = integers_at(table, (stop - 1) // block_size + 1)
    position = start
    while position < stop:
        end = run_end(position, stop, block_size)
        rows, stride = rows_from(position, end, stop, k, blocks, block_size, k_row_bytes, kind, size, scratch)
        for t in range(t_start, t_stop):
            low = max(position, first_visible(offset + t, window))
            high = min(end, offset + t + 1) if causal else end
            for head in range(ratio):
                target = place + 4 * (((t - t_start) * ratio + head) * KEYS_AT_A_TIME + low - start)
                query = q + t * q_step + 4 * head * size
                score_rows(query, rows + (low - position) * stride, stride, high - low, size, target)
        position = end
    for t in range(t_start, t_stop):
        low = max(start, first_visible(offset + t, window)) - start
        high = (min(stop, offset + t + 1) if causal else stop) - start
        for head in range(ratio):
            found = floats_at(out + (t - t_start) * out_step + head * width, v_size + 2)
            found[2:] = np.float32(0.0)
            row = ((t - t_start) * ratio + head) * KEYS_AT_A_TIME
            found[0], found[1] = weigh(scores[row + low : row + max(low, high)], max(0, high - low), scale, cap)
    position = start
    while position < stop:
        end = run_end(position, stop, block_size)
        rows, stride = rows_from(position, end, stop, v, blocks, block_size, v_row_bytes, kind, v_size, scratch)
        for t in range(t_start, t_stop):
            low = max(position, first_visible(offset + t, window))
            high = min(end, offset + t + 1) if causal else end
            factors = place + 4 * ((t - t_start) * ratio * KEYS_AT_A_TIME + low - start)
            target = out + (t - t_start) * out_step + 8
            mix_rows(factors, rows + (low - position) * stride, stride, max(0, high - low), v_size, target, ratio)
        position = end
    keep(scores)
    keep(scratch)


@ordered
def join(held, part, size):
    """Adds a part's m, l and o to those of the keys before it."""
    if part[0] == np.float32(-np.inf) and part[1] == np.float32(0.0):
        return
    if held[0] == np.float32(-np.inf) and held[1] == np.float32(0.0):
        held[:] = part
        return
    highest = held[0] if held[0] > part[0] else part[0]
    old, new = exp32(held[0] - highest), exp32(part[0] - highest)
    held[0] = highest
    for i in range(1, size + 2):
        held[i] = held[i] * old + part[i] * new


@ordered
def finish(held, sees, sink, has_sink, out, size):
    """out = o / l, the sink's exponential added to l; zeros for a query that sees nothing."""
    if not sees:
        out[:] = np.float32(0.0)
        return
    total, factor = held[1], np.float32(1.0)
    if has_sink:
        highest = held[0] if held[0] > sink else sink
        factor = exp32(held[0] - highest)
        total = total * factor + exp32(sink - highest)
    for i in range(size):
        out[i] = held[2 + i] * factor / total


@device
def empty_part(held):
    held[:] = np.float32(0.0)
    held[0] = np.float32(-np.inf)


@routine(integers=21, floats=2)
def attend_part(
    task, attend_keys, num_groups, splits, q, k, v, tables, table_size, block_size, lengths, tokens, heads, size,
    v_size, k_head_bytes, v_head_bytes, kind, causal, window, parts, scale, cap,
):  # fmt: skip
    """One task: a sequence's tokens, a kv head, and one part of the keys."""
    ratio, width = heads // num_groups, v_size + 2
    group, rest = task % num_groups, task // num_groups  # the heads of one part lie side by side in memory
    split, b = rest % splits, rest // splits
    length = integers_at(lengths + 8 * b, 1)[0]
    queries = q + 4 * (b * tokens * heads + group * ratio) * size
    out = parts + 4 * ((b * splits + split) * tokens * heads + group * ratio) * width
    for t in range(tokens):
        for head in range(ratio):
            empty_part(floats_at(out + 4 * (t * heads + head) * width, width))
    start, stop = split * KEYS_AT_A_TIME, min(length, (split + 1) * KEYS_AT_A_TIME)
    if start < stop:
        call(attend_keys, (
            queries, 4 * heads * size, 0, tokens, ratio, size, k + group * k_head_bytes, v + group * v_head_bytes,
            tables + 8 * b * table_size, block_size, num_groups * k_head_bytes, num_groups * v_head_bytes, v_size, kind,
            start, stop, length - tokens, causal, window, out, 4 * heads * width, scale, cap,
        ))  # fmt: skip


@routine(integers=10)
def join_parts(row, splits, tokens, heads, v_size, lengths, causal, sinks, parts, out):
    """Joins what was found for one token of one sequence, and divides."""
    width, b, t = v_size + 2, row // tokens, row % tokens
    length = integers_at(lengths + 8 * b, 1)[0]
    position = length - tokens + t
    sees = position >= 0 and length > 0 if causal else length > 0
    held = np.empty(width, np.float32)
    for head in range(heads):
        empty_part(held)
        for split in range(splits):
            place = parts + 4 * (((b * splits + split) * tokens + t) * heads + head) * width
            join(held, floats_at(place, width), v_size)
        sink = floats_at(sinks + 4 * head, 1)[0] if sinks else np.float32(0.0)
        finish(held, sees, sink, sinks != 0, floats_at(out + 4 * (row * heads + head) * v_size, v_size), v_size)


@parallel_kernel
def attend(
    threads, attend_keys, attend_part, join_parts, q, k, v, tables, table_size, block_size, lengths, batches, tokens,
    heads, num_groups, size, v_size, k_head_bytes, v_head_bytes, kind, causal, window, sinks, splits, parts, out, work,
    scale, cap,
):  # fmt: skip
    """The addresses of those three routines. q (B, T, H, D) and out (B, T, H, Dv) float32; k and v of one kind, rows of
    all kv heads one behind another.

    tables (B, table_size) and lengths (B,) int64; work: products of q and k to be made; parts: room for B * splits *
    T * H * (Dv + 2) float32.
    """
    num_tasks = batches * num_groups * splits
    if threads == 1 or work < SMALLEST_PARALLEL:
        for task in range(num_tasks):
            call(attend_part, (
                task, attend_keys, num_groups, splits, q, k, v, tables, table_size, block_size, lengths, tokens, heads,
                size, v_size, k_head_bytes, v_head_bytes, kind, causal, window, parts, np.float32(scale),
                np.float32(cap),
            ))  # fmt: skip
        for row in range(batches * tokens):
            call(join_parts, (row, splits, tokens, heads, v_size, lengths, causal, sinks, parts, out))
        return
    for task in prange(num_tasks):
        call(attend_part, (
            task, attend_keys, num_groups, splits, q, k, v, tables, table_size, block_size, lengths, tokens, heads,
            size, v_size, k_head_bytes, v_head_bytes, kind, causal, window, parts, np.float32(scale), np.float32(cap),
        ))  # fmt: skip
    for row in prange(batches * tokens):
        call(join_parts, (row, splits, tokens, heads, v_size, lengths, causal, sinks, parts, out))
