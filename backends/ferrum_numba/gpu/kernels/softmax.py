"""Softmax along one axis: one block for each lane of elements.   Clause: BK-NCUDA-8 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, kernel
from ferrum_numba.gpu.kernels.reduction import MOST_WARPS, block_max, block_sum
from ferrum_numba.gpu.storage import Storage


def softmax(x: Storage) -> Kernel:
    """p = exp(x - max) / sum(exp(x - max)) over `length` elements, `stride` apart; lanes (outer, stride).

    A NaN is left out of the maximum and reaches the sum, so its whole lane is NaN; so is one of -inf only.
    """
    load, store = x.load, x.store

    @kernel(x.array, x.array, INTEGER, INTEGER)
    def softmax(source: Any, target: Any, length: int, stride: int) -> None:
        partials = cuda.shared.array(MOST_WARPS, np.float32)
        start = (cuda.blockIdx.x // stride) * length * stride + cuda.blockIdx.x % stride
        top = np.float32(-math.inf)
        for index in range(cuda.threadIdx.x, length, cuda.blockDim.x):
            value = load(source, start + index * stride)
            if value > top:
                top = value
        top = block_max(top, partials)
        total = np.float32(0.0)
        for index in range(cuda.threadIdx.x, length, cuda.blockDim.x):
            total += math.exp(load(source, start + index * stride) - top)
        total = block_sum(total, partials)
        for index in range(cuda.threadIdx.x, length, cuda.blockDim.x):
            place = start + index * stride
            store(target, place, math.exp(load(source, place) - top) / total)

    return softmax
