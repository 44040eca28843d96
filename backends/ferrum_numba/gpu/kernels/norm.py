"""RMSNorm, RMSNorm of a residual sum, LayerNorm: one block for each row, or one warp where rows are short.

A thread takes packs of eight columns in turn and keeps its first two in registers: a row of up to HELD packs a thread
is read once, its weights before the sum is known. Sums are float32 in each thread, then a butterfly in each warp, then
warp by warp.   Clauses: BK-NCUDA-6, BK-NCUDA-8, BK-NCUDA-42 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, REAL, Kernel, cuda, device, kernel, libdevice
from ferrum_numba.gpu.kernels.packs import Access, narrow_access, wide_access
from ferrum_numba.gpu.kernels.reduction import MOST_WARPS, WARP, row_sum
from ferrum_numba.gpu.pack_math import ZERO, dot, plus, scaled, shifted, sum_of, times
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.wide import PACK, is_aligned

HELD = 2  # packs of a row in a thread's registers
MOST_THREADS = 512  # of a row
ROWS_TOGETHER = 8  # short rows of a block
Body = Callable[..., None]


def blocks_for(num_rows: int, num_columns: int) -> tuple[int, tuple[int, int, int]]:
    """(grid, block): a warp a row where it has room for all of it, else a block a row. Pure."""
    num_packs = -(-num_columns // PACK)
    if num_packs <= HELD * WARP:
        together = min(num_rows, ROWS_TOGETHER)
        return -(-num_rows // together), (WARP, together, 1)
    threads = -(-num_packs // (HELD * WARP)) * WARP
    return num_rows, (min(threads, MOST_THREADS), 1, 1)


def rms_norm(x: Storage, w: Storage) -> Kernel:
    """y = x / sqrt(mean(x**2) + eps) * weight; rows of `num_columns`."""
    wide, narrow = (_rms_norm(*access) for access in _accesses(x, w))

    @kernel(x.array, w.array, x.array, INTEGER, INTEGER, REAL)
    def rms_norm(source: Any, weight: Any, target: Any, num_rows: int, num_columns: int, eps: Any) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        if row < num_rows:  # one answer for all threads of a row
            start = row * num_columns
            if num_columns % PACK == 0 and is_aligned(source) and is_aligned(weight) and is_aligned(target):
                wide(source, weight, target, start, num_columns, eps, partials)
            else:
                narrow(source, weight, target, start, num_columns, eps, partials)

    return rms_norm


def _rms_norm(at: Access, of: Access) -> Body:
    fetch, widen, put, fetch_weight, widen_weight = at.fetch, at.widen, at.put, of.fetch, of.widen

    @device
    def body(source: Any, weight: Any, target: Any, start: int, end: int, eps: Any, partials: Any) -> None:
        step = cuda.blockDim.x * PACK
        first = cuda.threadIdx.x * PACK
        second = first + step
        a, b = fetch(source, start, first, end), fetch(source, start, second, end)
        u, v = fetch_weight(weight, 0, first, end), fetch_weight(weight, 0, second, end)
        x, y = widen(a), widen(b)
        squares = dot(y, y, dot(x, x, ZERO))
        more = second + step
        while more < end:
            z = widen(fetch(source, start, more, end))
            squares = dot(z, z, squares)
            more += step
        scale = libdevice.rsqrtf(row_sum(squares, partials) / np.float32(end) + eps)
        put(target, start, first, end, times(scaled(x, scale), widen_weight(u)))
        put(target, start, second, end, times(scaled(y, scale), widen_weight(v)))
        more = second + step
        while more < end:
            z = widen(fetch(source, start, more, end))
            put(target, start, more, end, times(scaled(z, scale), widen_weight(fetch_weight(weight, 0, more, end))))
            more += step

    return body


def rms_norm_residual(x: Storage, w: Storage) -> Kernel:
    """total = x + residual, target = rms_norm(total); the norm reads the sum before it is rounded (D-16)."""
    wide, narrow = (_rms_norm_residual(*access) for access in _accesses(x, w))

    @kernel(x.array, x.array, w.array, x.array, x.array, INTEGER, INTEGER, REAL)
    def rms_norm_residual(
        source: Any,
        residual: Any,
        weight: Any,
        target: Any,
        total: Any,
        num_rows: int,
        num_columns: int,
        eps: Any,
    ) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        if row < num_rows:  # one answer for all threads of a row
            start = row * num_columns
            is_whole = num_columns % PACK == 0 and is_aligned(source) and is_aligned(residual)
            if is_whole and is_aligned(weight) and is_aligned(target) and is_aligned(total):
                wide(source, residual, weight, target, total, start, num_columns, eps, partials)
            else:
                narrow(source, residual, weight, target, total, start, num_columns, eps, partials)

    return rms_norm_residual


def _rms_norm_residual(at: Access, of: Access) -> Body:
    fetch, widen, put, fetch_weight, widen_weight = at.fetch, at.widen, at.put, of.fetch, of.widen

    @device
    def body(
        source: Any,
        residual: Any,
        weight: Any,
        target: Any,
        total: Any,
        start: int,
        end: int,
        eps: Any,
        partials: Any,
    ) -> None:
        step = cuda.blockDim.x * PACK
        first = cuda.threadIdx.x * PACK
        second = first + step
        a, b = fetch(source, start, first, end), fetch(source, start, second, end)
        c, d = fetch(residual, start, first, end), fetch(residual, start, second, end)
        u, v = fetch_weight(weight, 0, first, end), fetch_weight(weight, 0, second, end)
        x, y = plus(widen(a), widen(c)), plus(widen(b), widen(d))
        put(total, start, first, end, x)
        put(total, start, second, end, y)
        squares = dot(y, y, dot(x, x, ZERO))
        more = second + step
        while more < end:
            z = plus(widen(fetch(source, start, more, end)), widen(fetch(residual, start, more, end)))
            put(total, start, more, end, z)
            squares = dot(z, z, squares)
            more += step
        scale = libdevice.rsqrtf(row_sum(squares, partials) / np.float32(end) + eps)
        put(target, start, first, end, times(scaled(x, scale), widen_weight(u)))
        put(target, start, second, end, times(scaled(y, scale), widen_weight(v)))
        more = second + step
        while more < end:
            z = plus(widen(fetch(source, start, more, end)), widen(fetch(residual, start, more, end)))
            put(target, start, more, end, times(scaled(z, scale), widen_weight(fetch_weight(weight, 0, more, end))))
            more += step

    return body


def layer_norm(x: Storage, w: Storage) -> Kernel:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, in two passes; bias is read where has_bias is not 0."""
    wide, narrow = (_layer_norm(*access) for access in _accesses(x, w))

    @kernel(x.array, w.array, w.array, x.array, INTEGER, INTEGER, REAL, INTEGER)
    def layer_norm(
        source: Any,
        weight: Any,
        bias: Any,
        target: Any,
        num_rows: int,
        num_columns: int,
        eps: Any,
        has_bias: int,
    ) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        if row < num_rows:  # one answer for all threads of a row
            start = row * num_columns
            is_whole = num_columns % PACK == 0 and is_aligned(source) and is_aligned(weight)
            if is_whole and is_aligned(bias) and is_aligned(target):
                wide(source, weight, bias, target, start, num_columns, eps, has_bias, partials)
            else:
                narrow(source, weight, bias, target, start, num_columns, eps, has_bias, partials)

    return layer_norm


def _layer_norm(at: Access, of: Access) -> Body:
    fetch, widen, put, fetch_weight, widen_weight = at.fetch, at.widen, at.put, of.fetch, of.widen

    @device
    def weighed(
        off: Any, scale: Any, weight: Any, bias: Any, target: Any, start: int, first: int, end: int, has_bias: int
    ) -> None:
        value = times(scaled(off, scale), widen_weight(fetch_weight(weight, 0, first, end)))
        if has_bias != 0:
            value = plus(value, widen_weight(fetch_weight(bias, 0, first, end)))
        put(target, start, first, end, value)

    @device
    def body(
        source: Any,
        weight: Any,
        bias: Any,
        target: Any,
        start: int,
        end: int,
        eps: Any,
        has_bias: int,
        partials: Any,
    ) -> None:
        step = cuda.blockDim.x * PACK
        first = cuda.threadIdx.x * PACK
        second = first + step
        a, b = fetch(source, start, first, end), fetch(source, start, second, end)
        x, y = widen(a), widen(b)
        total = sum_of(y, sum_of(x, ZERO))
        more = second + step
        while more < end:
            total = sum_of(widen(fetch(source, start, more, end)), total)
            more += step
        mean = row_sum(total, partials) / np.float32(end)
        x, y = shifted(x, mean, first, end), shifted(y, mean, second, end)
        squares = dot(y, y, dot(x, x, ZERO))
        more = second + step
        while more < end:
            z = shifted(widen(fetch(source, start, more, end)), mean, more, end)
            squares = dot(z, z, squares)
            more += step
        scale = libdevice.rsqrtf(row_sum(squares, partials) / np.float32(end) + eps)
        weighed(x, scale, weight, bias, target, start, first, end, has_bias)
        weighed(y, scale, weight, bias, target, start, second, end, has_bias)
        more = second + step
        while more < end:
            z = shifted(widen(fetch(source, start, more, end)), mean, more, end)
            weighed(z, scale, weight, bias, target, start, more, end, has_bias)
            more += step

    return body


def _accesses(x: Storage, w: Storage) -> tuple[tuple[Access, Access], tuple[Access, Access]]:
    """((wide x, wide w), (narrow x, narrow w))."""
    return (wide_access(x), wide_access(w)), (narrow_access(), narrow_access())
