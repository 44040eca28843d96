"""Kernels of matrix products with stored weights: one or a few rows of x times every row of the weight.

The weight is read once, four rows at a time, each row group meeting all rows of x while it is in cache; more rows of x
than that are better served by unpacking some of the weight (`unpack_rows`) and a dense product.
Clauses: BK-NCPU-12..13 (specs/backend_numba.md), KN-QLINEAR-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import bytes_at, call, floats_at, halves_at, small_integers_at
from ferrum_numba.cpu.compiled import device, parallel_kernel, routine
from ferrum_numba.cpu.floats import bfloat_to_float, half_to_float
from ferrum_numba.cpu.threads import chunk_bounds, num_chunks
from ferrum_numba.cpu.vector import (
    BF16,
    BLOCK,
    F16,
    F32,
    I8,
    Q4_0,
    Q8_0,
    ROWS,
    dots_bf16,
    dots_f16,
    dots_f32,
    dots_i8,
    dots_q4_0,
    dots_q8_0,
)

WEIGHTS_A_CHUNK = 16384  # worth a thread
UNPACKED_A_CHUNK = 1 << 24  # the same between matrix products, whose threads still spin for milliseconds


@device
def dots(kind, weight, stride, x, size, out):
    """ROWS rows of the weight with one row of x."""
    if kind == F32:
        dots_f32(weight, stride, x, size, out)
    elif kind == I8:
        dots_i8(weight, stride, x, size, out)
    elif kind == Q8_0:
        dots_q8_0(weight, stride, x, size, out)
    elif kind == Q4_0:
        dots_q4_0(weight, stride, x, size, out)
    elif kind == F16:
        dots_f16(weight, stride, x, size, out)
    else:
        dots_bf16(weight, stride, x, size, out)


@routine(integers=11)
def multiply_rows(start, stop, kind, weight, stride, scales, x, out, num_x, size, num_weights):
    """out[m, r] for the rows start .. stop - 1 of the weight; x (num_x, size), out (num_x, num_weights), float32.

    `scales` are a float32 for each row of the weight, 0 where there are none.
    """
    found = np.empty(ROWS, np.float32)
    row = start
    while row < stop:
        taken = min(ROWS, stop - row)
        apart = stride if taken == ROWS else 0  # too few rows are left: the first of them that often
        for m in range(num_x):
            dots(kind, weight + row * stride, apart, x + 4 * m * size, size, found.ctypes.data)
            target = floats_at(out + 4 * (m * num_weights + row), taken)
            for i in range(taken):
                if i > 0 and taken < ROWS:
                    dots(kind, weight + (row + i) * stride, 0, x + 4 * m * size, size, found.ctypes.data)
                target[i] = found[i]
            if scales:
                factors = floats_at(scales + 4 * row, taken)
                for i in range(taken):
                    target[i] *= factors[i]
        row += taken


@parallel_kernel
def multiply(threads, multiply_rows, kind, weight, stride, scales, x, out, num_x, size, num_weights):
    """out = x @ weight.T for few rows of x; `multiply_rows` is the address of that routine."""
    groups = (num_weights + ROWS - 1) // ROWS
    chunks = num_chunks(threads, groups, WEIGHTS_A_CHUNK // max(1, ROWS * size * num_x))
    if chunks == 1:
        call(multiply_rows, (0, num_weights, kind, weight, stride, scales, x, out, num_x, size, num_weights))
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, groups)
        stop = min(num_weights, stop * ROWS)
        call(
            multiply_rows,
            (start * ROWS, stop, kind, weight, stride, scales, x, out, num_x, size, num_weights),
        )


@device
def unpack(kind, row, scale, size, target):
    """One row of the weight as float32: exact for ggml's blocks, whose products need at most 19 bits."""
    if kind == I8:
        quanta = small_integers_at(row, size)
        for i in range(size):
            target[i] = np.float32(quanta[i]) * scale
        return
    block_bytes = 34 if kind == Q8_0 else 18
    for block in range(size // BLOCK):
        place = row + block * block_bytes
        d = half_to_float(halves_at(place, 1)[0])
        if kind == Q8_0:
            quanta = small_integers_at(place + 2, BLOCK)
            for i in range(BLOCK):
                target[block * BLOCK + i] = np.float32(quanta[i]) * d
        else:
            nibbles = bytes_at(place + 2, BLOCK // 2)
            for i in range(BLOCK // 2):
                low, high = np.int32(nibbles[i]) & np.int32(15), np.int32(nibbles[i]) >> np.int32(4)
                target[block * BLOCK + i] = np.float32(low - np.int32(8)) * d
                target[block * BLOCK + BLOCK // 2 + i] = np.float32(high - np.int32(8)) * d


@device
def widen_row(kind, row, scale, size, target):
    if kind == F16:
        bits = halves_at(row, size)
        for i in range(size):
            target[i] = half_to_float(bits[i])
    elif kind == BF16:
        bits = halves_at(row, size)
        for i in range(size):
            target[i] = bfloat_to_float(bits[i])
    else:
        unpack(kind, row, scale, size, target)


@device
def unpack_run(start, stop, kind, weight, stride, scales, out, size):
    for row in range(start, stop):
        scale = floats_at(scales + 4 * row, 1)[0] if scales else np.float32(1.0)
        widen_row(kind, weight + row * stride, scale, size, floats_at(out + 4 * row * size, size))


@parallel_kernel
def unpack_rows(threads, kind, weight, stride, scales, out, num_rows, size):
    """float32 (num_rows, size) of stored rows."""
    chunks = num_chunks(threads, num_rows, UNPACKED_A_CHUNK // max(1, size))
    if chunks == 1:
        unpack_run(0, num_rows, kind, weight, stride, scales, out, size)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        unpack_run(start, stop, kind, weight, stride, scales, out, size)
