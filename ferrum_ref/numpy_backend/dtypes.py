"""DataType <-> numpy element type, and the common type of two operands.   Clauses: TN-DTYPE-2..3, TN-FP8-1..3."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError
from ferrum_ref.interfaces.tensor import Fp8Format
from ferrum_ref.kernels.rounding import (
    BFLOAT16,
    FLOAT8,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    INT4,
    UINT4,
    DType,
)
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
FP8_TYPES: Mapping[Fp8Format, DType] = MappingProxyType({Fp8Format.E4M3FN: FLOAT8, Fp8Format.E5M2: FLOAT8_E5M2})
DATA_TYPES: Mapping[DType, DataType] = MappingProxyType(
    {**{element: data for data, element in ELEMENT_TYPES.items()}, FLOAT8_E5M2: DataType.FP8}
)
FOUR_BITS = frozenset((INT4, UINT4))

_FLOATS = frozenset((FLOAT32, FLOAT16, BFLOAT16, FLOAT8, FLOAT8_E5M2))


def element_type(dtype: DataType, fp8: Fp8Format | None = None) -> DType:
    """The numpy element type of a DataType; `fp8` says which FP8, E4M3FN when None.  [TN-FP8-1]

    Pure. Raises InvalidParameterError for a format given with another type than FP8.
    """
    if fp8 is None:
        return ELEMENT_TYPES[dtype]
    if dtype is not DataType.FP8:
        raise InvalidParameterError(f"fp8 format {fp8.name} with element type {dtype}, expected it with fp8 only")
    return FP8_TYPES[fp8]


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

    Equal float types stay. Two floats: the wider; two of one width, as FP16 with BF16 and the two FP8 formats: FP32.
    Float with integer or BOOL: the float. Two integers: numpy's common type. Raises BackendError where none fits: two
    4-bit integers, BOOL with BOOL, signed 32-bit with UINT32.
    """
    if a == b and a in _FLOATS:
        return a
    if a in _FLOATS and b in _FLOATS:
        if a.itemsize == b.itemsize:
            return FLOAT32
        return a if a.itemsize > b.itemsize else b
    if a in _FLOATS or b in _FLOATS:
        return a if a in _FLOATS else b
    if a not in FOUR_BITS and b not in FOUR_BITS:
        common = np.promote_types(a, b)
        if common in DATA_TYPES and common.kind != "b":
            return common
    raise BackendError(f"{operation}: no common element type for {a} and {b}; convert one with to_dtype")
