"""Attention of many queries: scores and mixtures are products of tiles and panels, as those of `products`.

A task is a run of a sequence's queries and a kv head; the heads that share it are rows of one product. Keys are taken
KEYS_AT_A_TIME at a time, as for few queries, and the parts joined in order. A query's result is the same whatever
queries lie beside it: what a tile must not see of a part has the factor 0 or is left out.
Clauses: BK-NCPU-10..11 (specs/backend_numba.md), KN-ATTN-*, KN-PAGED-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Final

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import call, fetch_and_add, floats_at, integers_at, keep
from ferrum_numba.cpu.attending import KEYS_AT_A_TIME, empty_part, finish, first_visible, join, row_address, weigh
from ferrum_numba.cpu.compiled import device, parallel_kernel, routine
from ferrum_numba.cpu.products import PRODUCTS_A_CHUNK, on_a_line, pack_panel
from ferrum_numba.cpu.threads import num_chunks
from ferrum_numba.cpu.tiles import PANEL, multiply_tile, rows_of_tile
from ferrum_numba.cpu.vector import LINE_BYTES

ROWS_AT_A_TIME: Final = 192  # query heads of a task, about: their scores of a part fit a second-level cache
FEWEST_QUERIES: Final = 8
SPARE: Final = LINE_BYTES // 4


@device
def queries_at_a_time(ratio):
    return max(FEWEST_QUERIES, ROWS_AT_A_TIME // ratio)


@device
def visible(position, part):
    """(first, behind the last) of a part's keys that the query at `position` sees, counted from the part's first.

    part: (first key, behind the last, causal, window).
    """
    start, stop, causal, window = part
    low = min(stop, max(start, first_visible(position, window))) if causal else start
    high = min(stop, position + 1) if causal else stop
    return low - start, max(low, high) - start


@device
def visible_to_tile(position, row, taken, ratio, part):
    """The same for the rows from `row` on that make a tile: from what the first sees to what the last sees."""
    low, _ = visible(position + row // ratio, part)
    _, high = visible(position + (row + taken - 1) // ratio, part)
    return low, high


@device
def decode_rows(unpack, base, blocks, block_size, row_bytes, first, stop, size, out):
    """float32 (stop - first, size) of the rows at the positions first .. stop - 1, which lie in blocks."""
    position = first
    while position < stop:
        end = min(stop, (position // block_size + 1) * block_size)
        source = row_address(position, base, blocks, block_size, row_bytes)
        call(unpack, (0, end - position, source, row_bytes, 0, out + 4 * (position - first) * size, size))
        position = end


@device
def score_part(q, num_rows, ratio, size, keys, position, part, panel, scores):
    """scores[r][j] = q_r . key j of the part; those of panels that none of a tile's rows sees are left as they are.

    q (R, D), row r a head of the query at `position` + r // ratio; keys (.., D) float32; scores (R, KEYS_AT_A_TIME).
    """
    count, step = part[1] - part[0], 4 * KEYS_AT_A_TIME
    for first in range(0, count, PANEL):
        pack_panel(0, keys + 4 * first * size, 4 * size, count - first, size, 0, panel)
        row = 0
        while row < num_rows:
            taken = rows_of_tile(num_rows - row)
            low, high = visible_to_tile(position, row, taken, ratio, part)
            if low < first + PANEL and first < high:
                target = scores + row * step + 4 * first
                multiply_tile(q + 4 * row * size, 4 * size, taken, panel, 4 * PANEL, size, target, step, 0)
            row += taken


@device
def weigh_part(scores, num_rows, ratio, position, part, scale, cap, found, width):
    """Scores to exponentials, 0 where a row does not see the key; found (R, width): the largest score and the sum."""
    for row in range(num_rows):
        low, high = visible(position + row // ratio, part)
        factors = floats_at(scores + 4 * row * KEYS_AT_A_TIME, part[1] - part[0])
        factors[:low] = np.float32(0.0)
        factors[high:] = np.float32(0.0)
        pair = floats_at(found + 4 * row * width, 2)
        pair[0], pair[1] = weigh(factors[low:high], high - low, scale, cap)


@device
def mix_part(scores, num_rows, ratio, values, size, position, part, found, width):
    """The rows' weighted sums of the values (.., Dv) float32, to `found` (R, width), behind the two numbers there."""
    row, step = 0, 4 * KEYS_AT_A_TIME
    while row < num_rows:
        taken = rows_of_tile(num_rows - row)
        low, high = visible_to_tile(position, row, taken, ratio, part)
        for first in range(0, size, PANEL):
            panel, target = values + 4 * (low * size + first), found + 4 * (row * width + 2 + first)
            factors = scores + row * step + 4 * low
            multiply_tile(factors, step, taken, panel, 4 * size, high - low, target, 4 * width, 0)
        row += taken


@routine(integers=22, floats=2)
def attend_block(
    turn, num_tasks, num_runs, unpack, q, k, v, tables, table_size, block_size, lengths, tokens, heads, num_groups,
    size, v_size, k_head_bytes, v_head_bytes, causal, window, sinks, out, scale, cap,
):  # fmt: skip
    """The tasks that fall to this thread; the arguments are those of `attend_many`. `turn`: address of the next one."""
    ratio = heads // num_groups
    most = queries_at_a_time(ratio)
    num_panels = (v_size + PANEL - 1) // PANEL
    width = 2 + num_panels * PANEL
    gathered = np.empty(most * ratio * size, np.float32)
    held, found = np.empty((most * ratio, width), np.float32), np.empty((most * ratio, width), np.float32)
    scores = np.empty(most * ratio * KEYS_AT_A_TIME + SPARE, np.float32)
    panel = np.empty(size * PANEL + SPARE, np.float32)
    decoded = np.empty(KEYS_AT_A_TIME * max(size, v_size) + PANEL + SPARE, np.float32)  # a panel may read beyond a row
    factors, columns, rows, parts = on_a_line(scores), on_a_line(panel), on_a_line(decoded), found.ctypes.data
    while True:
        task = fetch_and_add(turn, 1)
        if task >= num_tasks:
            break
        group, rest = task % num_groups, task // num_groups
        run, b = num_runs - 1 - rest % num_runs, rest // num_runs  # those that see most come first
        length = integers_at(lengths + 8 * b, 1)[0]
        blocks = integers_at(tables + 8 * b * table_size, table_size)
        t_start, t_stop = run * most, min(tokens, (run + 1) * most)
        position, num_rows = length - tokens + t_start, (t_stop - t_start) * ratio
        for t in range(t_start, t_stop):
            source = floats_at(q + 4 * ((b * tokens + t) * heads + group * ratio) * size, ratio * size)
            gathered[(t - t_start) * ratio * size : (t - t_start + 1) * ratio * size] = source
        for row in range(num_rows):
            empty_part(held[row])
        first, end = 0, length
        if causal:
            first, end = first_visible(max(0, position), window), min(length, position + t_stop - t_start)
        for start in range(first // KEYS_AT_A_TIME * KEYS_AT_A_TIME, end, KEYS_AT_A_TIME):
            part = (start, min(end, start + KEYS_AT_A_TIME), causal, window)
            row_bytes, base = num_groups * k_head_bytes, k + group * k_head_bytes
            decode_rows(unpack, base, blocks, block_size, row_bytes, start, part[1], size, rows)
            score_part(gathered.ctypes.data, num_rows, ratio, size, rows, position, part, columns, factors)
            weigh_part(factors, num_rows, ratio, position, part, scale, cap, parts, width)
            row_bytes, base = num_groups * v_head_bytes, v + group * v_head_bytes
            decode_rows(unpack, base, blocks, block_size, row_bytes, start, part[1], v_size, rows)
            mix_part(factors, num_rows, ratio, rows, v_size, position, part, parts, width)
            for row in range(num_rows):
                join(held[row], found[row], v_size)
        for row in range(num_rows):
            t, head = t_start + row // ratio, group * ratio + row % ratio
            sees = length > 0 and (length - tokens + t >= 0 or not causal)
            sink = floats_at(sinks + 4 * head, 1)[0] if sinks else np.float32(0.0)
            target = floats_at(out + 4 * ((b * tokens + t) * heads + head) * v_size, v_size)
            finish(held[row], sees, sink, sinks != 0, target, v_size)
    keep(gathered)
    keep(found)
    keep(scores)
    keep(panel)
    keep(decoded)


@parallel_kernel
def attend_many(
    threads, attend_block, turn, unpack, q, k, v, tables, table_size, block_size, lengths, batches, tokens, heads,
    num_groups, size, v_size, k_head_bytes, v_head_bytes, causal, window, sinks, out, work, scale, cap,
):  # fmt: skip
    """q (B, T, H, D) and out (B, T, H, Dv) float32; k and v in blocks, rows of all kv heads one behind another.

    `unpack`: address of the routine that decodes their rows. tables (B, table_size) and lengths (B,) int64; sinks (H,)
    float32 or 0; work: products of q and k to be made; turn: address of an int64 that is 0, which the threads count up.
    """
    most = queries_at_a_time(heads // num_groups)
    num_runs = (tokens + most - 1) // most
    num_tasks = batches * num_groups * num_runs
    chunks = min(num_tasks, num_chunks(threads, work, PRODUCTS_A_CHUNK))
    fields = (
        turn, num_tasks, num_runs, unpack, q, k, v, tables, table_size, block_size, lengths, tokens, heads,
        num_groups, size, v_size, k_head_bytes, v_head_bytes, causal, window, sinks, out,
        np.float32(scale), np.float32(cap),
    )  # fmt: skip
    if chunks == 1:
        call(attend_block, fields)
    else:
        for _ in prange(chunks):
            call(attend_block, fields)
