"""Integer arguments of kernels: positions, token ids, slots, block numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.rounding import Array


def as_integers(operation: str, name: str, values: Sequence[int] | Array, ndim: int | None = 1) -> NDArray[np.int64]:
    """The values as an int64 array of `ndim` axes (None: any). Pure.  [KN-INTEGER-1]

    Raises InvalidParameterError unless they are integers; ShapeError for another number of axes.
    """
    if isinstance(values, np.ndarray):
        array = values
    else:
        array = np.array(values if len(values) else [], dtype=None if len(values) else np.int64)
    if array.dtype.kind not in "iu":
        raise InvalidParameterError(f"{operation}: {name} hold {array.dtype}, expected integers")
    if ndim is not None and array.ndim != ndim:
        raise ShapeError(f"{operation}: {name} have shape {array.shape}, expected {ndim} axes")
    return array.astype(np.int64, copy=False)
