"""Stored numbers on the device: element types, exact widening, rounding once.

BF16 lies in uint16 arrays and FP8 in uint8 ones, whose bits are theirs; every other type is the array module's own.
Clauses: BK-CUPY-5..6 (specs/backend_cupy.md), TN-CAST-* (specs/tensor.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from ferrum_cupy.machine import DeviceArray
from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.types.devices import DataType

ARRAY_TYPES: Mapping[DataType, Any] = MappingProxyType(
    {
        DataType.FP32: np.dtype(np.float32),
        DataType.FP16: np.dtype(np.float16),
        DataType.BF16: np.dtype(np.uint16),
        DataType.FP8: np.dtype(np.uint8),
        DataType.INT32: np.dtype(np.int32),
        DataType.INT16: np.dtype(np.int16),
        DataType.INT8: np.dtype(np.int8),
        DataType.UINT32: np.dtype(np.uint32),
        DataType.UINT16: np.dtype(np.uint16),
        DataType.UINT8: np.dtype(np.uint8),
        DataType.BOOL: np.dtype(np.bool_),
    }
)
HOST_TYPES: Mapping[DataType, Any] = MappingProxyType(
    {**ARRAY_TYPES, DataType.BF16: np.dtype(ml_dtypes.bfloat16), DataType.FP8: np.dtype(ml_dtypes.float8_e4m3fn)}
)
DATA_TYPES: Mapping[Any, DataType] = MappingProxyType({theirs: ours for ours, theirs in HOST_TYPES.items()})
FLOATS = frozenset({DataType.FP32, DataType.FP16, DataType.BF16, DataType.FP8})
FLOAT8_MAX = 448.0
_FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_FLOAT8_NAN, _FLOAT8_SIGN, _FLOAT8_LEAST_EXPONENT, _FLOAT8_FRACTION_BITS = 0x7F, 0x80, -6, 3


def array_type(dtype: DataType, operation: str) -> Any:
    """The array's element type for `dtype`. Pure. Raises DeviceError for a type that this backend has not."""
    if dtype not in ARRAY_TYPES:
        known = ", ".join(known.name for known in ARRAY_TYPES)
        raise DeviceError(f"{operation}: dtype: got {dtype.name}, expected one of {known}")
    return ARRAY_TYPES[dtype]


def widen(xp: Any, array: DeviceArray, dtype: DataType, operation: str) -> DeviceArray:
    """The values as float32, exactly. Pure. Raises BackendError for what is no float."""
    if dtype is DataType.FP32:
        return array
    if dtype is DataType.FP16:
        return array.astype(np.float32)
    if dtype is DataType.BF16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype is DataType.FP8:
        return xp.asarray(_FLOAT8_VALUES)[array]
    raise BackendError(f"{operation}: element type {dtype.name}, expected fp32, fp16 or bf16; convert with to_dtype")


def narrow(xp: Any, values: DeviceArray, dtype: DataType) -> DeviceArray:
    """float32 or float64 values rounded once to a float `dtype`, to nearest, ties to even; FP8 saturates. Pure."""
    if dtype is DataType.FP8:
        return _float8(xp, values.astype(np.float64))
    if values.dtype == np.float64:
        values = values.astype(np.float32) if dtype is DataType.FP32 else _odd(xp, values)
    if dtype is DataType.FP32:
        return values
    if dtype is DataType.FP16:
        return values.astype(np.float16)
    bits = xp.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return xp.where(xp.isnan(values), quiet, rounded).astype(np.uint16)


def _odd(xp: Any, values: DeviceArray) -> DeviceArray:
    """float64 cut to float32 with the last bit set where inexact: rounding that again equals rounding once. Pure.

    Source: Boldo & Melquiond 2008, theorem on rounding to odd.
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = xp.ascontiguousarray(near).view(np.int32).reshape(values.shape) - (xp.abs(back) > xp.abs(values)).astype(
        np.int32
    )
    inexact = (back != values) & ~xp.isnan(values)
    return xp.ascontiguousarray(bits | inexact.astype(np.int32)).view(np.float32).reshape(values.shape)


def _float8(xp: Any, values: DeviceArray) -> DeviceArray:
    """Bits of E4M3FN: to the nearest multiple of the binade's step, beyond 448 to 448, NaN to NaN. Pure."""
    size = xp.minimum(xp.abs(values), FLOAT8_MAX)
    _, exponent = xp.frexp(size)
    step = xp.ldexp(1.0, xp.maximum(exponent - 1, _FLOAT8_LEAST_EXPONENT) - _FLOAT8_FRACTION_BITS)
    nearest = xp.rint(size / step) * step
    bits = xp.searchsorted(xp.asarray(_FLOAT8_VALUES[:_FLOAT8_NAN].astype(np.float64)), nearest)
    bits = xp.where(xp.isnan(values), _FLOAT8_NAN, bits)
    return xp.asarray(bits | xp.where(xp.signbit(values), _FLOAT8_SIGN, 0)).astype(np.uint8)


def cast(xp: Any, array: DeviceArray, source: DataType, target: DataType) -> DeviceArray:
    """The values converted to another storage type; itself if it has that type. Pure.

    float -> integer: to nearest, ties to even, clipped; integer -> integer: clipped; anything -> bool: is it nonzero.
    Raises DeviceError for NaN -> integer.
    """
    if source is target:
        return array
    is_float = source in FLOATS
    if target is DataType.BOOL:  # by bits: a GPU may take subnormal numbers for zero
        return (_magnitude_bits(xp, array) if is_float else array) != 0
    if target in FLOATS:
        if is_float:
            return narrow(xp, widen(xp, array, source, "to_dtype"), target)
        return narrow(xp, array.astype(np.float64), target)
    limits = np.iinfo(ARRAY_TYPES[target])
    if not is_float:
        wide = array.astype(np.int64)
        return xp.clip(wide, int(limits.min), int(limits.max)).astype(ARRAY_TYPES[target])
    wide = widen(xp, array, source, "to_dtype").astype(np.float64)
    if bool(xp.isnan(wide).any()):
        raise DeviceError(f"to_dtype: NaN has no value in {target.name}; replace it first")
    return xp.clip(xp.rint(wide), float(limits.min), float(limits.max)).astype(np.int64).astype(ARRAY_TYPES[target])


def _magnitude_bits(xp: Any, array: DeviceArray) -> DeviceArray:
    """The bits of floats without their signs. Pure."""
    bits = xp.ascontiguousarray(array).view(np.dtype(f"u{array.itemsize}")).reshape(array.shape)
    return bits & bits.dtype.type(2 ** (8 * array.itemsize - 1) - 1)


def common_type(operation: str, a: DataType, b: DataType) -> DataType:
    """The element type of a result of two operands.  [TN-DTYPE-2]  Pure. Raises BackendError where none fits."""
    if a in FLOATS or b in FLOATS:
        if a is b or b not in FLOATS:
            return a
        if a not in FLOATS:
            return b
        sizes = ARRAY_TYPES[a].itemsize, ARRAY_TYPES[b].itemsize
        return DataType.FP32 if sizes[0] == sizes[1] else a if sizes[0] > sizes[1] else b
    common = DATA_TYPES.get(np.promote_types(ARRAY_TYPES[a], ARRAY_TYPES[b]))
    if common is None or common is DataType.BOOL:
        raise BackendError(f"{operation}: no common element type for {a.name} and {b.name}; convert one with to_dtype")
    return common
