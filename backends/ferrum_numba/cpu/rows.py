"""Kernels over rows: RMSNorm with and without a residual, LayerNorm, softmax.

Each row is widened to float32, computed there, and rounded once to its own type. Rows are spread over the threads; a
row's result does not depend on how many there are.
Clauses: BK-NCPU-8 (specs/backend_numba.md), KN-RMSNORM-*, KN-LAYERNORM-*, KN-SOFTMAX-* (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import floats_at
from ferrum_numba.cpu.compiled import device, ordered, parallel_kernel
from ferrum_numba.cpu.floats import element_bytes, exp32, room_for, store, widened
from ferrum_numba.cpu.threads import chunk_bounds, num_chunks
from ferrum_numba.cpu.vector import LINE_BYTES, largest

SMALLEST_CHUNK = 1 << 16  # elements worth a thread


@device
def sum_of_squares(row, size):
    squares = np.float32(0.0)
    for i in range(size):
        squares += row[i] * row[i]
    return squares


@ordered
def add(row, added, summed, size):
    for i in range(size):
        summed[i] = row[i] + added[i]


@device
def centre(row, mean, centred, size):
    """centred = row - mean: the sum of its squares."""
    squares = np.float32(0.0)
    for i in range(size):
        value = row[i] - mean
        centred[i] = value
        squares += value * value
    return squares


@device
def inverse_root(squares, size, eps):
    """1 / sqrt(mean + eps), `squares` the sum over `size`."""
    return np.float32(1.0) / np.float32(math.sqrt(squares / np.float32(size) + np.float32(eps)))


@device
def inverse_root_mean_square(row, size, eps):
    """1 / sqrt(mean(row**2) + eps)."""
    return inverse_root(sum_of_squares(row, size), size, eps)


@device
def to_whole_line(array, size):
    """How many of its float32 lie before the first cache line that begins in it: stores across two lines are slow.

    For what goes element by element only: a sum must not depend on where its row lies.
    """
    return min(size, (-array.ctypes.data & (LINE_BYTES - 1)) // 4)


@ordered
def scale(row, weight, factor, out, size):
    for i in range(size):
        out[i] = row[i] * factor * weight[i]


@ordered
def scale_and_shift(row, weight, factor, bias, out, size):
    for i in range(size):
        out[i] = row[i] * factor * weight[i] + bias[i]


@device
def normalise(row, weight, factor, out, size):
    first = to_whole_line(out, size)
    scale(row, weight, factor, out, first)
    scale(row[first:], weight[first:], factor, out[first:], size - first)


@device
def rms_norm_rows(start, stop, x, residual, weight, normed, total, size, eps, kind):
    """`residual` and `total` are 0 where there is nothing to add."""
    scratch, other = np.empty(size, np.float32), np.empty(size, np.float32)
    gain, step = floats_at(weight, size), size * element_bytes(kind)
    for index in range(start, stop):
        row = widened(x + index * step, kind, size, scratch)
        if residual:
            added = widened(residual + index * step, kind, size, other)
            summed = room_for(total + index * step, kind, size, scratch)
            first = to_whole_line(summed, size)
            add(row, added, summed, first)
            add(row[first:], added[first:], summed[first:], size - first)
            row = summed
        factor = inverse_root_mean_square(row, size, eps)
        out = room_for(normed + index * step, kind, size, other)
        normalise(row, gain, factor, out, size)
        store(out, normed + index * step, kind, size)
        if residual:
            store(row, total + index * step, kind, size)


@parallel_kernel
def rms_norm(threads, x, residual, weight, normed, total, num_rows, size, eps, kind):
    chunks = num_chunks(threads, num_rows, SMALLEST_CHUNK // max(1, size))
    if chunks == 1:
        rms_norm_rows(0, num_rows, x, residual, weight, normed, total, size, eps, kind)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        rms_norm_rows(start, stop, x, residual, weight, normed, total, size, eps, kind)


@device
def layer_norm_rows(start, stop, x, weight, bias, normed, size, eps, kind):
    """Two passes: the mean, then the mean of the squared differences. `bias` is 0 where there is none."""
    scratch, centred = np.empty(size, np.float32), np.empty(size, np.float32)
    gain, step = floats_at(weight, size), size * element_bytes(kind)
    for index in range(start, stop):
        row = widened(x + index * step, kind, size, scratch)
        total = np.float32(0.0)
        for i in range(size):
            total += row[i]
        mean = total / np.float32(size)
        factor = inverse_root(centre(row, mean, centred, size), size, eps)
        out = room_for(normed + index * step, kind, size, scratch)
        if bias:
            shift, first = floats_at(bias, size), to_whole_line(out, size)
            scale_and_shift(centred, gain, factor, shift, out, first)
            scale_and_shift(centred[first:], gain[first:], factor, shift[first:], out[first:], size - first)
        else:
            normalise(centred, gain, factor, out, size)
        store(out, normed + index * step, kind, size)


@parallel_kernel
def layer_norm(threads, x, weight, bias, normed, num_rows, size, eps, kind):
    chunks = num_chunks(threads, num_rows, SMALLEST_CHUNK // max(1, size))
    if chunks == 1:
        layer_norm_rows(0, num_rows, x, weight, bias, normed, size, eps, kind)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        layer_norm_rows(start, stop, x, weight, bias, normed, size, eps, kind)


@device
def softmax_rows(start, stop, x, out, size, kind):
    """A row of -inf only, or with NaN or +inf in it, becomes NaN."""
    scratch, step = np.empty(size, np.float32), size * element_bytes(kind)
    for index in range(start, stop):
        row = widened(x + index * step, kind, size, scratch)
        highest = largest(row.ctypes.data, size)
        probabilities = room_for(out + index * step, kind, size, scratch)
        total = np.float32(0.0)
        for i in range(size):
            probabilities[i] = exp32(row[i] - highest)
        for i in range(size):
            total += probabilities[i]
        for i in range(size):
            probabilities[i] = probabilities[i] / total
        store(probabilities, out + index * step, kind, size)


@parallel_kernel
def softmax(threads, x, out, num_rows, size, kind):
    chunks = num_chunks(threads, num_rows, SMALLEST_CHUNK // 4 // max(1, size))
    if chunks == 1:
        softmax_rows(0, num_rows, x, out, size, kind)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        softmax_rows(start, stop, x, out, size, kind)
