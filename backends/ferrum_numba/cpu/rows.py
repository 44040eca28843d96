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
from ferrum_numba.cpu.vector import F32, largest, scale_past_cache

SMALLEST_CHUNK = 1 << 20  # elements worth a thread: one that wakes beside BLAS's own, still spinning, waits for ms
LARGE = 1 << 20  # elements of a float32 result that no cache of a core holds until it is read


@device
def inverse_root_mean_square(row, size, eps):
    """1 / sqrt(mean(row**2) + eps)."""
    squares = np.float32(0.0)
    for i in range(size):
        squares += row[i] * row[i]
    return np.float32(1.0) / np.float32(math.sqrt(squares / np.float32(size) + np.float32(eps)))


@ordered
def normalise(row, weight, factor, out, size):
    for i in range(size):
        out[i] = row[i] * factor * weight[i]


@device
def normalise_into(row, weight, factor, out, size, past_cache):
    if past_cache:
        scale_past_cache(row.ctypes.data, weight.ctypes.data, factor, out.ctypes.data, size)
    else:
        normalise(row, weight, factor, out, size)


@device
def rms_norm_rows(start, stop, x, residual, weight, normed, total, size, eps, kind, past_cache):
    """`residual` and `total` are 0 where there is nothing to add."""
    scratch, other = np.empty(size, np.float32), np.empty(size, np.float32)
    gain, step = floats_at(weight, size), size * element_bytes(kind)
    for index in range(start, stop):
        row = widened(x + index * step, kind, size, scratch)
        if residual:
            added = widened(residual + index * step, kind, size, other)
            summed = room_for(total + index * step, kind, size, scratch)
            for i in range(size):
                summed[i] = row[i] + added[i]
            row = summed
        factor = inverse_root_mean_square(row, size, eps)
        out = room_for(normed + index * step, kind, size, other)
        normalise_into(row, gain, factor, out, size, past_cache)
        store(out, normed + index * step, kind, size)
        if residual:
            store(row, total + index * step, kind, size)


@parallel_kernel
def rms_norm(threads, x, residual, weight, normed, total, num_rows, size, eps, kind):
    chunks = num_chunks(threads, num_rows, SMALLEST_CHUNK // max(1, size))
    past_cache = kind == F32 and num_rows * size >= LARGE
    if chunks == 1:
        rms_norm_rows(0, num_rows, x, residual, weight, normed, total, size, eps, kind, past_cache)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        rms_norm_rows(start, stop, x, residual, weight, normed, total, size, eps, kind, past_cache)


@device
def layer_norm_rows(start, stop, x, weight, bias, normed, size, eps, kind, past_cache):
    """Two passes: the mean, then the mean of the squared differences. `bias` is 0 where there is none."""
    scratch, centred = np.empty(size, np.float32), np.empty(size, np.float32)
    gain, step = floats_at(weight, size), size * element_bytes(kind)
    for index in range(start, stop):
        row = widened(x + index * step, kind, size, scratch)
        total = np.float32(0.0)
        for i in range(size):
            total += row[i]
        mean = total / np.float32(size)
        for i in range(size):
            centred[i] = row[i] - mean
        factor = inverse_root_mean_square(centred, size, eps)
        out = room_for(normed + index * step, kind, size, scratch)
        normalise_into(centred, gain, factor, out, size, past_cache and not bias)
        if bias:
            shift = floats_at(bias, size)
            for i in range(size):
                out[i] += shift[i]
        store(out, normed + index * step, kind, size)


@parallel_kernel
def layer_norm(threads, x, weight, bias, normed, num_rows, size, eps, kind):
    chunks = num_chunks(threads, num_rows, SMALLEST_CHUNK // max(1, size))
    past_cache = kind == F32 and num_rows * size >= LARGE
    if chunks == 1:
        layer_norm_rows(0, num_rows, x, weight, bias, normed, size, eps, kind, past_cache)
        return
    for chunk in prange(chunks):
        start, stop = chunk_bounds(chunk, chunks, num_rows)
        layer_norm_rows(start, stop, x, weight, bias, normed, size, eps, kind, past_cache)


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
