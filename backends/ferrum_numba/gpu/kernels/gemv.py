"""Few rows times a transposed matrix of floats: one warp for each output column.

A lane reads packs of eight neighbouring weights, two at a time, and a butterfly adds the lanes' sums. A warp takes up
to four rows of x, one after the other: the later ones find the weights in cache.
Clauses: BK-NCUDA-14, BK-NCUDA-42 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.packs import Access, narrow_access, wide_access
from ferrum_numba.gpu.kernels.reduction import WARP, warp_sum
from ferrum_numba.gpu.pack_math import ZERO, dot
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.wide import PACK, is_aligned

WARPS = 4  # of a block
ROWS = 4  # of x that a warp takes
STEP = WARP * PACK


def blocks_for(num_rows: int, num_columns: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(grid, block). Pure."""
    return (-(-num_columns // WARPS), -(-num_rows // ROWS), 1), (WARPS * WARP, 1, 1)


def gemv(x: Storage, w: Storage) -> Kernel:
    """target[row] = x[row] @ weight.T for rows 4 blockIdx.y .. + 3: x (rows, depth), weight (columns, depth)."""
    store = x.store
    wide, narrow = _dot(wide_access(x), wide_access(w)), _dot(narrow_access(), narrow_access())

    @kernel(x.array, w.array, x.array, INTEGER, INTEGER, INTEGER)
    def gemv(source: Any, weight: Any, target: Any, num_rows: int, num_columns: int, depth: int) -> None:
        column = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        if column < num_columns:  # one answer for all lanes of a warp, which the butterfly needs
            is_whole = depth % PACK == 0 and is_aligned(source) and is_aligned(weight)
            row = cuda.blockIdx.y * ROWS
            end = min(row + ROWS, num_rows)
            while row < end:
                if is_whole:
                    total = wide(source, row * depth, weight, column * depth, depth)
                else:
                    total = narrow(source, row * depth, weight, column * depth, depth)
                total = warp_sum(total)
                if cuda.threadIdx.x % WARP == 0:
                    store(target, row * num_columns + column, total)
                row += 1

    return gemv


def _dot(at: Access, of: Access) -> Callable[..., Any]:
    fetch, widen, fetch_weight, widen_weight = at.fetch, at.widen, of.fetch, of.widen

    @device
    def share(source: Any, start: int, weight: Any, first_weight: int, depth: int) -> Any:
        """This lane's share of the dot product of two rows."""
        total = ZERO
        first = cuda.threadIdx.x % WARP * PACK
        while first < depth:
            second = first + STEP
            u, v = fetch_weight(weight, first_weight, first, depth), fetch_weight(weight, first_weight, second, depth)
            x, y = fetch(source, start, first, depth), fetch(source, start, second, depth)
            total = dot(widen(x), widen_weight(u), total)
            total = dot(widen(y), widen_weight(v), total)
            first += 2 * STEP
        return total

    return share
