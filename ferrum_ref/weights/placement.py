"""From an array in its stored type to a tensor of the wanted type on the wanted device, rounded once.

Types without a DataType: F64 -> odd-rounded float32 first, so that the one rounding to a narrower float is the only
one; 64-bit integers saturate; E5M2 widens to float16, which holds all its values.  Clauses: WL-PLACE-1..3.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np

from ferrum_ref.errors import DeviceError, ModelError
from ferrum_ref.formats.elements import Array
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef
from ferrum_ref.types.devices import DataType, Device

DTYPES: Final[Mapping[DataType, np.dtype[Any]]] = MappingProxyType(
    {
        DataType.FP32: np.dtype(np.float32),
        DataType.FP16: np.dtype(np.float16),
        DataType.BF16: np.dtype(ml_dtypes.bfloat16),
        DataType.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
        DataType.INT32: np.dtype(np.int32),
        DataType.INT16: np.dtype(np.int16),
        DataType.INT8: np.dtype(np.int8),
        DataType.INT4: np.dtype(ml_dtypes.int4),
        DataType.UINT32: np.dtype(np.uint32),
        DataType.UINT16: np.dtype(np.uint16),
        DataType.UINT8: np.dtype(np.uint8),
        DataType.UINT4: np.dtype(ml_dtypes.uint4),
        DataType.BOOL: np.dtype(np.bool_),
    }
)
DATA_TYPES: Final[Mapping[np.dtype[Any], DataType]] = MappingProxyType({kind: data for data, kind in DTYPES.items()})
_E5M2: Final = np.dtype(ml_dtypes.float8_e5m2)


def place(values: Array, dtype: DataType, device: Device, factory: TensorFactory, what: str) -> TensorRef:
    """The values as a `dtype` tensor on `device`.  [WL-PLACE-1..3]

    Rounding and saturation are the backend's `to_dtype` (TN-CAST-1..5). Raises ModelError when the backend lacks the
    device or type, or a NaN has no counterpart in it.
    """
    try:
        return factory.from_numpy(np.asarray(_narrowed(values, dtype), order="C"), device).to_dtype(dtype)
    except DeviceError as error:
        raise ModelError(f"{what}: {error.message}") from None


def rounded(values: Array, dtype: DataType, factory: TensorFactory, what: str) -> Array:
    """The values rounded to `dtype` by the backend, back as an array."""
    try:
        array = np.asarray(_narrowed(values, dtype), order="C")
        return np.asarray(factory.from_numpy(array).to_dtype(dtype).to_cpu().to_numpy()).reshape(values.shape)
    except DeviceError as error:
        raise ModelError(f"{what}: {error.message}") from None


def _narrowed(values: Array, dtype: DataType) -> Array:
    """The values in a type that has a DataType, such that rounding them to `dtype` gives what rounding once gives."""
    kind = values.dtype
    if kind in DATA_TYPES:
        return values
    if kind == _E5M2:
        return values.astype(np.float16)
    if kind == np.float64:
        return _from_float64(values, dtype)
    if kind in (np.int64, np.uint64):
        if dtype.is_float():
            return _from_float64(values.astype(np.float64), dtype)
        if dtype == DataType.BOOL:
            return np.not_equal(values, 0)
        return _saturated(values, dtype)
    raise ModelError(f"load: got element type {kind}, expected a number type that a DataType can hold")


def _from_float64(values: Array, dtype: DataType) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == DataType.FP32:
            return values.astype(np.float32)
        if dtype == DataType.BOOL:
            return np.not_equal(values, 0)
        if dtype.is_float():
            return _to_odd_float32(values)
        if np.isnan(values).any():
            raise DeviceError(f"to_dtype: NaN has no value in {dtype}; replace it first")
        return _saturated(np.rint(values), dtype)


def _saturated(values: Array, dtype: DataType) -> Array:
    """Whole numbers clipped to the 32-bit type of `dtype`'s signedness."""
    wide = np.uint32 if dtype.value.startswith("UINT") else np.int32
    limits = np.iinfo(wide)
    low = 0 if values.dtype == np.uint64 else limits.min
    return np.clip(values, low, limits.max).astype(wide)


def _to_odd_float32(values: Array) -> Array:
    """Truncated to float32, the last bit set when inexact: rounding that again equals rounding once.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem on rounding to odd.
    """
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    away = np.abs(back) > np.abs(values)
    toward_zero = np.where(away, np.nextafter(nearest, np.float32(0)), nearest)
    odd = np.ascontiguousarray(toward_zero, np.float32).view(np.uint32) | ((back != values) & ~np.isnan(values))
    bits: Array = odd.astype(np.uint32).view(np.float32)
    return bits.reshape(values.shape)
