"""DataType <-> numpy element type, and the common type of two operands.   Clauses: TN-DTYPE-1..2."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.kernels.rounding import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, INT4, UINT4, DType
from ferrum_ref.types.devices import DataType

ELEMENT_TYPES: Mapping[DataType, DType] = MappingProxyType(
    {
        DataType.FP32: FLOAT32,
        DataType.FP16: FLOAT16,
        DataType.BF16: BFLOAT16,
        DataType.FP8: FLOAT8,
        DataType.INT32: np.dtype(np.int32),
        DataType.INT16: np.dtype(np.int16),
        DataType.INT8: np.dtype(np.int8),
        DataType.INT4: INT4,
        DataType.UINT32: np.dtype(np.uint32),
        DataType.UINT16: np.dtype(np.uint16),
        DataType.UINT8: np.dtype(np.uint8),
        DataType.UINT4: UINT4,
        DataType.BOOL: np.dtype(np.bool_),
    }
)
DATA_TYPES: Mapping[DType, DataType] = MappingProxyType({element: data for data, element in ELEMENT_TYPES.items()})

_FLOATS = frozenset((FLOAT32, FLOAT16, BFLOAT16, FLOAT8))


def data_type(element: DType) -> DataType:
    """The DataType of a numpy element type. Raises DeviceError if there is none (64-bit types among them)."""
    found = DATA_TYPES.get(element)
    if found is None:
        raise DeviceError(
            f"numpy tensor: element type {element} has no DataType; "
            "convert to float32 or int32 first, token ids with from_ids"
        )
    return found


def is_float(element: DType) -> bool:
    return element in _FLOATS


def common_type(operation: str, a: DType, b: DType) -> DType:
    """The element type of an operation on two operands.  [TN-DTYPE-2]

    Equal float types stay. Two floats: the wider; FP16 with BF16 is FP32. Float with integer or BOOL: the float.
    Two integers: numpy's common type. Raises BackendError where none fits: two 4-bit integers, BOOL with BOOL,
    signed 32-bit with UINT32.
    """
    if a == b and a in _FLOATS:
        return a
    if a in _FLOATS and b in _FLOATS:
        if a.itemsize == b.itemsize:
            return FLOAT32
        return a if a.itemsize > b.itemsize else b
    if a in _FLOATS or b in _FLOATS:
        return a if a in _FLOATS else b
    if a not in (INT4, UINT4) and b not in (INT4, UINT4):
        common = np.promote_types(a, b)
        if common in DATA_TYPES and common.kind != "b":
            return common
    raise BackendError(f"{operation}: no common element type for {a} and {b}; convert one with to_dtype")
