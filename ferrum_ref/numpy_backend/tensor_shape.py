"""Shapes that memory can hold.   Clauses: TN-FACTORY-1, TN-FACTORY-8."""

from __future__ import annotations

import math
import operator
import sys

from ferrum_ref.errors import ResourceExhaustedError, ShapeError
from ferrum_ref.interfaces.tensor import Shape
from ferrum_ref.types.devices import DataType

MAX_DIMS = 64  # numpy's own limit


def storage_bytes(shape: Shape, dtype: DataType) -> int:
    """The bytes that a tensor of that shape takes, 4-bit elements two to a byte. Pure."""
    return dtype.packed_bytes(math.prod(shape))


def check_shape(operation: str, shape: Shape, dtype: DataType) -> Shape:
    """The shape as a tuple of plain ints.  [TN-FACTORY-1, TN-FACTORY-8]

    Pure. Raises ShapeError for a dim that is no integer of 0 or more, or for more than 64; ResourceExhaustedError for
    more bytes than a machine can address, zero dims left out of account.
    """
    try:
        dims = tuple(-1 if isinstance(dim, bool) else operator.index(dim) for dim in shape)
    except TypeError:
        dims = (-1,)
    if any(dim < 0 for dim in dims):
        raise ShapeError(f"{operation}: shape {shape!r}, expected dims of 0 or more")
    if len(dims) > MAX_DIMS:
        raise ShapeError(f"{operation}: shape of {len(dims)} dims, expected at most {MAX_DIMS}")
    if dtype.size_bytes() * math.prod(max(1, dim) for dim in dims) > sys.maxsize:
        raise ResourceExhaustedError(f"{operation}: shape {dims} of {dtype}, more than a machine can address")
    return dims
