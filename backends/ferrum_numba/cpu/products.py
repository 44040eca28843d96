"""Products of many rows with stored weights, by panels: what BLAS does, over weights that need not be float32.

Of a few panels DEPTH columns at a time are decoded to float32, which is exact, and transposed; then all rows of x meet
them, a tile at a time. A result is a sum over DEPTH columns at a time, in order, these sums added in order: the same
whatever the number of rows, of outputs and of threads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Final

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import call, fetch_and_add, floats_at, keep
from ferrum_numba.cpu.compiled import device, parallel_kernel, routine
from ferrum_numba.cpu.lanes import LANES
from ferrum_numba.cpu.threads import num_chunks
from ferrum_numba.cpu.tiles import PANEL, multiply_tile, rows_of_tile, transpose_rows
from ferrum_numba.cpu.vector import LINE_BYTES

DEPTH: Final = 512  # a whole number of blocks of every kind; a group's panels of it fit a second-level cache
FEWEST_PANELS, MOST_PANELS = 3, 8  # at a time: more read x less often, fewer even out the threads
TURNS_A_THREAD: Final = 4
PRODUCTS_A_CHUNK: Final = 1 << 20  # multiply-adds worth a thread


@device
def on_a_line(array):
    """Where the first cache line begins in an array that has LINE_BYTES to spare."""
    return (array.ctypes.data + LINE_BYTES - 1) & -LINE_BYTES


@device
def pack_panel(unpack, weight, stride, num_rows, depth, decoded, panel):
    """`depth` columns of up to PANEL rows; `unpack` is 0 where the rows are float32 already."""
    for half in range(2):
        first = min(half * LANES, num_rows - 1)
        taken = min(LANES, num_rows - first)
        source, apart = weight + first * stride, stride
        if unpack:
            call(unpack, (0, taken, source, stride, 0, decoded, depth))
            source, apart = decoded, 4 * depth
        transpose_rows(source, apart, taken, depth, panel + 4 * LANES * half)


@device
def scale_columns(out, stride, num_rows, scales, count):
    factors = floats_at(scales, count)
    for m in range(num_rows):
        row = floats_at(out + m * stride, count)
        for i in range(count):
            row[i] *= factors[i]


@routine(integers=13)
def multiply_panels(turn, unpack, weight, stride, step, scales, x, out, num_x, size, num_weights, num_groups, width):
    """out[m, r] for the groups of panels that fall to this thread; x (num_x, size), out (num_x, num_weights), float32.

    `turn`: address of the number of the next group, of `width` panels. `step` is how many bytes of a row hold DEPTH
    columns, `scales` a float32 for each row, 0 where there are none.
    """
    num_panels = (num_weights + PANEL - 1) // PANEL
    packed = np.empty(width * DEPTH * PANEL + LINE_BYTES // 4, np.float32)
    scratch = np.empty(LANES * DEPTH + LINE_BYTES // 4, np.float32)
    edge = np.empty((num_x if num_weights % PANEL else 0) * PANEL, np.float32)
    panels, decoded = on_a_line(packed), on_a_line(scratch)
    while True:
        group = fetch_and_add(turn, 1)
        if group >= num_groups:
            break
        first, last = group * width, min((group + 1) * width, num_panels)
        for start in range(0, size, DEPTH):
            depth, source = min(DEPTH, size - start), weight + start // DEPTH * step
            for panel in range(first, last):
                row, target = panel * PANEL, panels + 4 * (panel - first) * DEPTH * PANEL
                pack_panel(unpack, source + row * stride, stride, num_weights - row, depth, decoded, target)
            m = 0
            while m < num_x:
                rows, taken = x + 4 * (m * size + start), rows_of_tile(num_x - m)
                for panel in range(first, last):
                    target, apart = out + 4 * (m * num_weights + panel * PANEL), 4 * num_weights
                    if (panel + 1) * PANEL > num_weights:
                        target, apart = edge.ctypes.data + 4 * m * PANEL, 4 * PANEL
                    place = panels + 4 * (panel - first) * DEPTH * PANEL
                    multiply_tile(rows, 4 * size, taken, place, 4 * PANEL, depth, target, apart, start)
                m += taken
        ragged = num_weights - (last - 1) * PANEL
        for m in range(num_x if ragged < PANEL else 0):
            target, found = floats_at(out + 4 * ((m + 1) * num_weights - ragged), ragged), edge[m * PANEL :]
            for i in range(ragged):
                target[i] = found[i]
        if scales:
            row, count = first * PANEL, min(num_weights, last * PANEL) - first * PANEL
            scale_columns(out + 4 * row, 4 * num_weights, num_x, scales + 4 * row, count)
    keep(packed)
    keep(scratch)


@parallel_kernel
def multiply_many(
    threads, multiply_panels, turn, unpack, weight, stride, step, scales, x, out, num_x, size, num_weights
):
    """out = x @ weight.T for many rows of x; `unpack` is the address of the routine that decodes rows, or 0.

    `turn`: address of an int64 that is 0, which the threads count up.
    """
    num_panels = (num_weights + PANEL - 1) // PANEL
    width = max(FEWEST_PANELS, min(MOST_PANELS, num_panels // (TURNS_A_THREAD * threads)))
    num_groups = (num_panels + width - 1) // width
    chunks = min(num_groups, num_chunks(threads, num_x * size * num_weights, PRODUCTS_A_CHUNK))
    fields = (
        turn, unpack, weight, stride, step, scales, x, out, num_x, size, num_weights, num_groups, width,
    )  # fmt: skip
    if chunks == 1:
        call(multiply_panels, fields)
    else:
        for _ in prange(chunks):
            call(multiply_panels, fields)
