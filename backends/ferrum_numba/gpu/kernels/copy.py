"""Moving elements without touching their bits: `bits` is an unsigned type of their width.

Clauses: BK-NCUDA-12, BK-NCUDA-13 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, INTEGERS, Kernel, cuda, kernel


def _flat(bits: np.dtype[Any]) -> str:
    return f"{bits.name}[::1]"


def gather_strided(bits: np.dtype[Any]) -> Kernel:
    """target = the elements of a view in row-major order: offset + sum of index * stride; stride 0 repeats."""

    @kernel(_flat(bits), _flat(bits), INTEGERS, INTEGERS, INTEGER, INTEGER, INTEGER)
    def gather_strided(source: Any, target: Any, shape: Any, strides: Any, rank: int, offset: int, count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            rest, place = index, offset
            for axis in range(rank - 1, -1, -1):
                place += rest % shape[axis] * strides[axis]
                rest //= shape[axis]
            target[index] = source[place]

    return gather_strided


def scatter_strided(bits: np.dtype[Any]) -> Kernel:
    """Where gather_strided reads, it writes: target[sum of index * stride] = the elements of source, row-major."""

    @kernel(_flat(bits), _flat(bits), INTEGERS, INTEGERS, INTEGER, INTEGER)
    def scatter_strided(source: Any, target: Any, shape: Any, strides: Any, rank: int, count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            rest, place = index, 0
            for axis in range(rank - 1, -1, -1):
                place += rest % shape[axis] * strides[axis]
                rest //= shape[axis]
            target[place] = source[index]

    return scatter_strided


def copy_runs(bits: np.dtype[Any]) -> Kernel:
    """Runs of `length` elements, one after the other in source, go to target `stride` apart from `start` on."""

    @kernel(_flat(bits), _flat(bits), INTEGER, INTEGER, INTEGER, INTEGER)
    def copy_runs(source: Any, target: Any, length: int, stride: int, start: int, count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            target[index // length * stride + start + index % length] = source[index]

    return copy_runs


def copy_rows(bits: np.dtype[Any]) -> Kernel:
    """Row to[i] of target = row of[i] of source, rows of `length` elements; no row of target twice."""

    @kernel(_flat(bits), _flat(bits), INTEGERS, INTEGERS, INTEGER, INTEGER)
    def copy_rows(source: Any, target: Any, of: Any, to: Any, length: int, count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            row, column = index // length, index % length
            target[to[row] * length + column] = source[of[row] * length + column]

    return copy_rows


def fill(bits: np.dtype[Any]) -> Kernel:
    """target = one element, repeated."""

    @kernel(_flat(bits), INTEGER, INTEGER)
    def fill(target: Any, value: int, count: int) -> None:
        index = cuda.grid(1)
        if index < count:
            target[index] = value

    return fill
