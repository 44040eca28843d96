"""What the parts of one numba-cuda backend share.   Clauses: BK-NCUDA-18 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.gpu.kernel import Kernel
from ferrum_numba.gpu.kernels.copy import gather_strided
from ferrum_numba.gpu.machine import DeviceArray, Grid, Machine
from ferrum_numba.gpu.storage import BITS
from ferrum_ref.errors import BackendError

THREADS = 256


@dataclass(frozen=True, slots=True)
class Tuning:
    """Which kernel takes which sizes; the results' bounds do not depend on it.

    gemv_rows    a matrix product of at most so many rows goes column by column; beyond, in tiles
    split_rows   attention of at most so many new tokens splits its keys among blocks of threads ...
    split_keys   ... so many keys to each: fixed, so a sequence gives the same bits alone and in a batch
    """

    gemv_rows: int = 8
    split_rows: int = 8
    split_keys: int = 512


class Runtime:
    """The machine of a backend, its kernels once made, and how many operations it has done.

    The count is that of one thread at a time; concurrent callers may lose increments, nothing else.
    """

    def __init__(self, machine: Machine, tuning: Tuning) -> None:
        self.machine, self.tuning = machine, tuning
        self.is_open = True
        self.num_operations = 0
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def begin(self, operation: str) -> None:
        """Count an operation. Raises BackendError after shutdown."""
        if not self.is_open:
            raise BackendError(f"{operation}: the numba-cuda backend was shut down; make a new one with make_backend")
        self.num_operations += 1

    def launch(
        self,
        make: Callable[..., Kernel],
        of: Sequence[Any],
        grid: Grid,
        block: Grid,
        *arguments: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Queue the kernel that `make(*of)` gives; it is made once."""
        key = (make, *of)
        if key not in self._kernels:
            self._kernels[key] = make(*of)
        self.machine.launch(self._kernels[key], grid, block, *arguments, shared_bytes=shared_bytes)

    def launch_each(self, make: Callable[..., Kernel], of: Sequence[Any], count: int, *arguments: Any) -> None:
        """The same, with one thread for each of `count` elements; nothing for 0."""
        if count:
            block = min(THREADS, whole_warps(count))
            self.launch(make, of, -(-count // block), block, *arguments)

    def integers(self, values: NDArray[np.int64]) -> DeviceArray:
        """Host integers on the device, flat."""
        flat = np.ascontiguousarray(values, dtype=np.int64).reshape(-1)
        return self.machine.upload(flat if flat.size else np.zeros(1, np.int64))

    def shape_on_device(self, sizes: Sequence[int]) -> DeviceArray:
        """Sizes or strides, and a 1 more: never empty."""
        return self.integers(np.array([*sizes, 1]))

    def gathered(
        self,
        array: DeviceArray,
        shape: Sequence[int],
        strides: Sequence[int],
        offset: int,
        element: np.dtype[Any],
        target: DeviceArray | None = None,
    ) -> DeviceArray:
        """A view's elements in row-major order in `target`, or in a fresh flat array."""
        count, bits = math.prod(shape), BITS[element.itemsize]
        target = self.machine.empty(count, element) if target is None else target
        sizes, steps = self.shape_on_device(shape), self.shape_on_device(strides)
        arguments = (array.view(bits), target.view(bits), sizes, steps, len(shape), offset, count)
        self.launch_each(gather_strided, (bits,), count, *arguments)
        return target


def whole_warps(count: int, most: int = THREADS) -> int:
    """The number of threads for `count` things: whole warps of 32, at most `most`. Pure."""
    return min(most, max(1, -(-count // 32)) * 32)
