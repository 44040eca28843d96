"""Integer arguments: positions, token ids, slots, block numbers. They come from the host, where they are checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints

IntArray = NDArray[np.int64]


def as_integers(operation: str, argument: str, values: Ints, ndim: int = 1) -> IntArray:
    """The values as an int64 array of `ndim` axes. Pure.

    Raises InvalidParameterError unless they are integers; ShapeError for another number of axes.
    """
    array = np.asarray(values) if len(values) else np.zeros(np.shape(values), np.int64)
    if array.dtype.kind not in "iu":
        raise InvalidParameterError(f"{operation}: {argument}: got {array.dtype}, expected integers")
    if array.ndim != ndim:
        raise ShapeError(f"{operation}: {argument}: got shape {array.shape}, expected {ndim} axes")
    return array.astype(np.int64, copy=False)


def check_below(operation: str, argument: str, values: IntArray, end: int, remedy: str) -> None:
    """Raises InvalidParameterError unless 0 <= value < end for each."""
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < end:
        bad = values[(values < 0) | (values >= end)]
        raise InvalidParameterError(
            f"{operation}: {argument}: got {int(bad[0])}, expected 0 <= value < {end}; {remedy}"
        )
