"""The first maximum: each block looks through its share, the host through the blocks' answers.

Clause: BK-NCUDA-15 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, REALS, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.reduction import ALL_LANES, MOST_WARPS, WARP
from ferrum_numba.gpu.storage import Storage


@device
def goes_before(value: Any, index: int, other: Any, other_index: int) -> Any:
    """True if (value, index) is to be preferred: a NaN first of all, then the larger, then the lower index."""
    if value != value:
        return other == other or index < other_index
    return other == other and (value > other or (value == other and index < other_index))


def argmax(x: Storage) -> Kernel:
    """values[b], indices[b] = the best element of block b's share of logits (count,); index `count` means none."""
    load = x.load

    @kernel(x.array, REALS, INTEGERS, INTEGER)
    def argmax(logits: Any, values: Any, indices: Any, count: int) -> None:
        best_values = cuda.shared.array(MOST_WARPS, np.float32)
        best_indices = cuda.shared.array(MOST_WARPS, np.int64)
        thread = cuda.threadIdx.x
        best, place = np.float32(-math.inf), count
        for index in range(cuda.grid(1), count, cuda.gridsize(1)):
            value = load(logits, index)
            if goes_before(value, index, best, place):
                best, place = value, index
        step = WARP // 2
        while step > 0:
            other = cuda.shfl_xor_sync(ALL_LANES, best, step)
            other_place = cuda.shfl_xor_sync(ALL_LANES, place, step)
            if goes_before(other, other_place, best, place):
                best, place = other, other_place
            step //= 2
        if thread % WARP == 0:
            best_values[thread // WARP] = best
            best_indices[thread // WARP] = place
        cuda.syncthreads()
        if thread == 0:
            for warp in range(1, cuda.blockDim.x // WARP):
                if goes_before(best_values[warp], best_indices[warp], best, place):
                    best, place = best_values[warp], best_indices[warp]
            values[cuda.blockIdx.x] = best
            indices[cuda.blockIdx.x] = place

    return argmax
