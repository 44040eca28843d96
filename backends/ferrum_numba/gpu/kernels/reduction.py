"""Sums and maxima over the lanes of a warp and the threads of a block; every thread gets the result.

A warp exchanges by butterfly (each step adds what lane ^ step holds), so all lanes end with the same bits.
Clause: BK-NCUDA-6 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import cuda, device

ALL_LANES = 0xFFFFFFFF
WARP = 32
MOST_WARPS = 32


@device
def warp_sum(value: Any) -> Any:
    value += cuda.shfl_xor_sync(ALL_LANES, value, 16)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 8)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 4)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 2)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 1)
    return value


@device
def larger(a: Any, b: Any) -> Any:
    return b if b > a else a


@device
def warp_max(value: Any) -> Any:
    """The largest of 32 values, none of them NaN."""
    value = larger(value, cuda.shfl_xor_sync(ALL_LANES, value, 16))
    value = larger(value, cuda.shfl_xor_sync(ALL_LANES, value, 8))
    value = larger(value, cuda.shfl_xor_sync(ALL_LANES, value, 4))
    value = larger(value, cuda.shfl_xor_sync(ALL_LANES, value, 2))
    return larger(value, cuda.shfl_xor_sync(ALL_LANES, value, 1))


@device
def block_sum(value: Any, partials: Any) -> Any:
    """partials: float32[32] in shared memory, free again afterwards. The block is one-dimensional, of whole warps."""
    total = warp_sum(value)
    if cuda.threadIdx.x % WARP == 0:
        partials[cuda.threadIdx.x // WARP] = total
    cuda.syncthreads()
    result = np.float32(0.0)
    for warp in range(cuda.blockDim.x // WARP):
        result += partials[warp]
    cuda.syncthreads()
    return result


@device
def row_sum(value: Any, partials: Any) -> Any:
    """block_sum over the x axis of a block: of whole warps with y size 1, or of one warp, which takes no barrier."""
    if cuda.blockDim.x == WARP:
        return warp_sum(value)
    return block_sum(value, partials)


@device
def block_max(value: Any, partials: Any) -> Any:
    """As block_sum; no value may be NaN."""
    top = warp_max(value)
    if cuda.threadIdx.x % WARP == 0:
        partials[cuda.threadIdx.x // WARP] = top
    cuda.syncthreads()
    result = partials[0]
    for warp in range(1, cuda.blockDim.x // WARP):
        result = larger(result, partials[warp])
    cuda.syncthreads()
    return result
