"""Few rows times a transposed matrix: one warp for each output column.

Lanes read neighbouring weights and a butterfly adds their sums. A warp takes up to four rows of x, one after the other:
the later ones find the weights in cache.
Clause: BK-NCUDA-14 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.reduction import WARP, warp_sum
from ferrum_numba.gpu.kernels.weights import BLOCK, Q4_WORDS, Q8_WORDS, Weights, signed
from ferrum_numba.gpu.storage import Storage

WARPS = 4  # of a block
ROWS = 4  # of x that a warp takes

Dot = Callable[..., Any]


def dense_dot(x: Storage, w: Weights) -> Dot:
    """dot(source, row, words, scales, column, depth): this lane's share of x[row] . weight[column]."""
    load, weight_at = x.load, w.weight

    @device
    def dot(source: Any, row: int, words: Any, scales: Any, column: int, depth: int) -> Any:
        total = np.float32(0.0)
        for k in range(cuda.laneid, depth, WARP):
            total += load(source, row * depth + k) * weight_at(words, scales, column, k, depth)
        return total

    return dot


def q4_dot(x: Storage, w: Weights) -> Dot:
    """The same over Q4_0 blocks: a lane takes a word, which holds four weights."""
    load = x.load

    @device
    def dot(source: Any, row: int, words: Any, scales: Any, column: int, depth: int) -> Any:
        total = np.float32(0.0)
        first_block = column * (depth // BLOCK)
        for place in range(cuda.laneid, depth // 4, WARP):
            block, pair = place // 8, place % 8
            start = (first_block + block) * Q4_WORDS
            word, scale = int(words[start + 1 + pair]), np.float32(scales[start])
            k = row * depth + block * BLOCK + 2 * pair
            total += load(source, k) * (scale * np.float32((word & 15) - 8))
            total += load(source, k + 1) * (scale * np.float32((word >> 8 & 15) - 8))
            total += load(source, k + 16) * (scale * np.float32((word >> 4 & 15) - 8))
            total += load(source, k + 17) * (scale * np.float32((word >> 12 & 15) - 8))
        return total

    return dot


def q8_dot(x: Storage, w: Weights) -> Dot:
    """The same over Q8_0 blocks: a lane takes a word, which holds two weights."""
    load = x.load

    @device
    def dot(source: Any, row: int, words: Any, scales: Any, column: int, depth: int) -> Any:
        total = np.float32(0.0)
        first_block = column * (depth // BLOCK)
        for place in range(cuda.laneid, depth // 2, WARP):
            block, pair = place // 16, place % 16
            start = (first_block + block) * Q8_WORDS
            word, scale = int(words[start + 1 + pair]), np.float32(scales[start])
            k = row * depth + block * BLOCK + 2 * pair
            total += load(source, k) * (scale * np.float32(signed(word & 255)))
            total += load(source, k + 1) * (scale * np.float32(signed(word >> 8 & 255)))
        return total

    return dot


def gemv(x: Storage, w: Weights) -> Kernel:
    """target[row] = x[row] @ weight.T for rows 4 blockIdx.y .. + 3: x (rows, depth), weight (columns, depth)."""
    store = x.store
    dot = {"q4_0": q4_dot, "q8_0": q8_dot}.get(w.name, dense_dot)(x, w)

    @kernel(x.array, w.words, w.scales, x.array, INTEGER, INTEGER, INTEGER)
    def gemv(source: Any, words: Any, scales: Any, target: Any, num_rows: int, num_columns: int, depth: int) -> None:
        column = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        if column < num_columns:  # one answer for all lanes of a warp, which the butterfly needs
            for part in range(ROWS):
                row = cuda.blockIdx.y * ROWS + part
                if row < num_rows:
                    total = warp_sum(dot(source, row, words, scales, column, depth))
                    if cuda.threadIdx.x % WARP == 0:
                        store(target, row * num_columns + column, total)

    return gemv
