"""Bugs that any kernel can have: a part of the result is not written, a view misread, what is no number lost."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.honest.attention import with_arrays
from ferrum_ref.parity.honest.sums import Kernel
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]


def rows_kept(kernel: Kernel, count: int) -> Kernel:
    """A grid of `count` rows: those beyond stay zero."""

    def kept(y: Array) -> Array:
        y = np.array(y, order="C")
        if y.ndim > 1 and y.size:
            y.reshape(-1, y.shape[-1])[count:] = 0
        return y

    return lambda inputs: tuple(kept(y) for y in kernel(inputs))


def elements_kept(kernel: Kernel, count: int) -> Kernel:
    """One block of `count` threads for all elements: those beyond stay zero."""

    def kept(y: Array) -> Array:
        y = np.array(y, order="C")
        y.reshape(-1)[count:] = 0
        return y

    return lambda inputs: tuple(kept(y) for y in kernel(inputs))


def columns_kept(kernel: Kernel, count: int) -> Kernel:
    """One block of `count` threads a row: the columns beyond stay zero."""

    def kept(y: Array) -> Array:
        y = np.array(y)
        y[..., count:] = 0
        return y

    return lambda inputs: tuple(kept(y) for y in kernel(inputs))


def nan_taken_for_zero(kernel: Kernel) -> Kernel:
    """NaN is lost, as a maximum or a clamp loses it."""
    return lambda inputs: tuple(np.where(np.isnan(y), np.zeros_like(y), y) for y in kernel(inputs))


def saturating(kernel: Kernel) -> Kernel:
    """What lies beyond the largest number becomes that number instead of infinity."""

    def run(inputs: Inputs) -> Outputs:
        largest = inputs.storage.largest
        clipped = (np.clip(y.astype(np.float64), -largest, largest) for y in kernel(inputs))
        return tuple(y.astype(inputs.storage.numpy_dtype) for y in clipped)

    return run


def rows_taken_for_contiguous(kernel: Kernel, *names: str) -> Kernel:
    """Rows that are parts of longer ones are read as if each began where the last one ended."""

    def misread(x: Array) -> Array:
        if x.flags.c_contiguous or x.strides[-1] != x.itemsize or not isinstance(x.base, np.ndarray):
            return x
        start = (x.ctypes.data - x.base.ctypes.data) // x.itemsize
        return np.asarray(x.base.reshape(-1)[start : start + x.size].reshape(x.shape))

    return lambda inputs: kernel(with_arrays(inputs, **{name: misread(inputs.arrays[name]) for name in names}))
