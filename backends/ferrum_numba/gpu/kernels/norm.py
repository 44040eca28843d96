"""RMSNorm, RMSNorm of a residual sum, LayerNorm: one block for each row.

The threads take columns in turn; sums are float32 in each thread, then a butterfly in each warp, then warp by warp.
Clauses: BK-NCUDA-6, BK-NCUDA-8 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, REAL, Kernel, cuda, kernel, libdevice
from ferrum_numba.gpu.kernels.reduction import MOST_WARPS, block_sum
from ferrum_numba.gpu.storage import Storage


def rms_norm(x: Storage, w: Storage) -> Kernel:
    """y = x / sqrt(mean(x**2) + eps) * weight; rows of `num_columns`."""
    load, store, load_weight = x.load, x.store, w.load

    @kernel(x.array, w.array, x.array, INTEGER, REAL)
    def rms_norm(source: Any, weight: Any, target: Any, num_columns: int, eps: Any) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        start = cuda.blockIdx.x * num_columns
        squares = np.float32(0.0)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            value = load(source, start + column)
            squares += value * value
        mean = block_sum(squares, partials) / np.float32(num_columns)
        scale = libdevice.rsqrtf(mean + eps)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            store(target, start + column, load(source, start + column) * scale * load_weight(weight, column))

    return rms_norm


def rms_norm_residual(x: Storage, w: Storage) -> Kernel:
    """total = x + residual, target = rms_norm(total); the norm reads the sum before it is rounded (D-16)."""
    load, store, load_weight = x.load, x.store, w.load

    @kernel(x.array, x.array, w.array, x.array, x.array, INTEGER, REAL)
    def rms_norm_residual(
        source: Any, residual: Any, weight: Any, target: Any, total: Any, num_columns: int, eps: Any
    ) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        start = cuda.blockIdx.x * num_columns
        squares = np.float32(0.0)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            value = load(source, start + column) + load(residual, start + column)
            store(total, start + column, value)
            squares += value * value
        mean = block_sum(squares, partials) / np.float32(num_columns)
        scale = libdevice.rsqrtf(mean + eps)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            value = load(source, start + column) + load(residual, start + column)
            store(target, start + column, value * scale * load_weight(weight, column))

    return rms_norm_residual


def layer_norm(x: Storage, w: Storage) -> Kernel:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, in two passes; bias is read where has_bias is not 0."""
    load, store, load_weight = x.load, x.store, w.load

    @kernel(x.array, w.array, w.array, x.array, INTEGER, REAL, INTEGER)
    def layer_norm(source: Any, weight: Any, bias: Any, target: Any, num_columns: int, eps: Any, has_bias: int) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        start = cuda.blockIdx.x * num_columns
        total = np.float32(0.0)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            total += load(source, start + column)
        mean = block_sum(total, partials) / np.float32(num_columns)
        squares = np.float32(0.0)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            value = load(source, start + column) - mean
            squares += value * value
        variance = block_sum(squares, partials) / np.float32(num_columns)
        scale = libdevice.rsqrtf(variance + eps)
        for column in range(cuda.threadIdx.x, num_columns, cuda.blockDim.x):
            value = (load(source, start + column) - mean) * scale * load_weight(weight, column)
            if has_bias != 0:
                value += load_weight(bias, column)
            store(target, start + column, value)

    return layer_norm
