"""Matrix times transposed matrix, in tiles of 64 x 64 held in shared memory; every thread keeps 4 x 4 sums.

Clauses: BK-NCUDA-14 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, kernel
from ferrum_numba.gpu.kernels.weights import Weights
from ferrum_numba.gpu.storage import Storage

TILE = 64
DEPTH = 16
SIDE = 16  # threads are SIDE x SIDE; thread (i, j) has rows i, i + 16, ... and columns j, j + 16, ... of the tile
PADDED = TILE + 1  # keeps a column's elements in different banks


def gemm(x: Storage, w: Weights) -> Kernel:
    """target[b] = x[b] @ weight[b].T: x (rows, depth), weight (columns, depth), b = blockIdx.z; float32 sums."""
    load, store, weight_at = x.load, x.store, w.weight

    @kernel(x.array, w.words, w.scales, x.array, INTEGER, INTEGER, INTEGER)
    def gemm(source: Any, words: Any, scales: Any, target: Any, num_rows: int, num_columns: int, depth: int) -> None:
        x_tile = cuda.shared.array((DEPTH, PADDED), np.float32)
        w_tile = cuda.shared.array((DEPTH, PADDED), np.float32)
        j, i = cuda.threadIdx.x, cuda.threadIdx.y
        thread = i * SIDE + j
        top, left = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
        first_row, first_column = cuda.blockIdx.z * num_rows, cuda.blockIdx.z * num_columns
        zero = np.float32(0.0)
        s00, s01, s02, s03 = zero, zero, zero, zero
        s10, s11, s12, s13 = zero, zero, zero, zero
        s20, s21, s22, s23 = zero, zero, zero, zero
        s30, s31, s32, s33 = zero, zero, zero, zero
        has_work = top + i < num_rows and left + j < num_columns
        for start in range(0, depth, DEPTH):
            for part in range(TILE * DEPTH // (SIDE * SIDE)):
                place = thread + part * SIDE * SIDE
                line, k = place // DEPTH, place % DEPTH
                x_value, w_value = zero, zero
                if start + k < depth:
                    if top + line < num_rows:
                        x_value = load(source, (first_row + top + line) * depth + start + k)
                    if left + line < num_columns:
                        w_value = weight_at(words, scales, first_column + left + line, start + k, depth)
                x_tile[k, line] = x_value
                w_tile[k, line] = w_value
            cuda.syncthreads()
            if has_work:
                for k in range(DEPTH):
                    a0, a1, a2, a3 = x_tile[k, i], x_tile[k, i + 16], x_tile[k, i + 32], x_tile[k, i + 48]
                    b0, b1, b2, b3 = w_tile[k, j], w_tile[k, j + 16], w_tile[k, j + 32], w_tile[k, j + 48]
                    s00, s01, s02, s03 = s00 + a0 * b0, s01 + a0 * b1, s02 + a0 * b2, s03 + a0 * b3
                    s10, s11, s12, s13 = s10 + a1 * b0, s11 + a1 * b1, s12 + a1 * b2, s13 + a1 * b3
                    s20, s21, s22, s23 = s20 + a2 * b0, s21 + a2 * b1, s22 + a2 * b2, s23 + a2 * b3
                    s30, s31, s32, s33 = s30 + a3 * b0, s31 + a3 * b1, s32 + a3 * b2, s33 + a3 * b3
            cuda.syncthreads()
        for part in range(4):
            row = top + i + part * SIDE
            if row < num_rows:
                c0, c1, c2, c3 = s00, s01, s02, s03
                if part == 1:
                    c0, c1, c2, c3 = s10, s11, s12, s13
                if part == 2:
                    c0, c1, c2, c3 = s20, s21, s22, s23
                if part == 3:
                    c0, c1, c2, c3 = s30, s31, s32, s33
                out = (first_row + row) * num_columns + left + j
                if left + j < num_columns:
                    store(target, out, c0)
                if left + j + 16 < num_columns:
                    store(target, out + 16, c1)
                if left + j + 32 < num_columns:
                    store(target, out + 32, c2)
                if left + j + 48 < num_columns:
                    store(target, out + 48, c3)

    return gemm
