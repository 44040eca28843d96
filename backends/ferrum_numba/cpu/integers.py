"""Integer arguments: positions, token ids, slots, block numbers. They live on the host, where they are checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints


def as_integers(operation: str, argument: str, values: Ints, ndim: int = 1) -> NDArray[np.int64]:
    """The values as an int64 array of `ndim` axes. Pure.

    Raises InvalidParameterError unless they are integers; ShapeError for another number of axes.
    """
    array = np.asarray(values) if len(values) else np.zeros(np.shape(values), np.int64)
    if array.dtype.kind not in "iu":
        raise InvalidParameterError(f"{operation}: {argument}: got {array.dtype}, expected integers")
    if array.ndim != ndim:
        raise ShapeError(f"{operation}: {argument}: got shape {array.shape}, expected {ndim} axes")
    return array.astype(np.int64, copy=False)


def is_run(values: NDArray[np.int64]) -> bool:
    """True if the values are consecutive and ascending, so that a slice can stand for them. Pure."""
    count = len(values)
    return count == 1 or (count > 1 and int(values[-1] - values[0]) == count - 1 and bool((np.diff(values) == 1).all()))
