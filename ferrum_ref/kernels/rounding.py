"""In which precision a kernel computes, and how a result is rounded once to its storage type.

compute(x) = float64 if x is float64, else float32.   Clauses: KN-PRECISION-1..3, TN-CAST-1..5, TN-FP8-1..3.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, DeviceError

Array: TypeAlias = NDArray[Any]
DType: TypeAlias = np.dtype[Any]

FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)
FLOAT16: DType = np.dtype(np.float16)
BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
FLOAT8: DType = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2: DType = np.dtype(ml_dtypes.float8_e5m2)
INT4: DType = np.dtype(ml_dtypes.int4)
UINT4: DType = np.dtype(ml_dtypes.uint4)
FLOAT8_MAX = 448.0

_COMPUTE: Mapping[DType, DType] = MappingProxyType(
    {
        FLOAT32: FLOAT32,
        FLOAT16: FLOAT32,
        BFLOAT16: FLOAT32,
        FLOAT8: FLOAT32,
        FLOAT8_E5M2: FLOAT32,
        FLOAT64: FLOAT64,
    }
)


def compute_dtype(operation: str, *arrays: Array) -> DType:
    """float64 if any argument is float64, else float32.  [KN-PRECISION-1]

    Pure. Raises BackendError for arrays that hold no floating-point numbers.
    """
    result = FLOAT32
    for array in arrays:
        compute = _COMPUTE.get(array.dtype)
        if compute is None:
            raise BackendError(
                f"{operation}: element type {array.dtype}, expected float16, bfloat16, float8_e4m3fn, "
                "float8_e5m2, float32 or float64; convert with to_dtype"
            )
        if compute is FLOAT64:
            result = FLOAT64
    return result


def widen(array: Array, dtype: DType) -> Array:
    """The array in the compute type; itself if it has that type already."""
    return array if array.dtype == dtype else array.astype(dtype)


def round_to(values: Array, dtype: DType) -> Array:
    """float32 or float64 values rounded once to `dtype`, to nearest, ties to even.

    [KN-PRECISION-2, TN-CAST-1..2, TN-FP8-2]

    float16, bfloat16, float8_e5m2, float32: overflow gives infinity. float8_e4m3fn: overflow and infinities give
    +-448. NaN stays.
    Pure; returns `values` itself when it has that type.
    """
    if values.dtype == dtype:
        return values
    if values.dtype == FLOAT64 and dtype in (BFLOAT16, FLOAT8, FLOAT8_E5M2):
        values = _to_odd_float32(values)
    if dtype == FLOAT8:
        values = np.clip(values, -FLOAT8_MAX, FLOAT8_MAX)
    return np.asarray(values.astype(dtype))


def _to_odd_float32(values: Array) -> Array:
    """Truncated to float32 with the last bit set when inexact: rounding that again equals rounding once.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem on rounding to odd.
    """
    narrow = values.astype(FLOAT32)
    back = narrow.astype(FLOAT64)
    bits = np.atleast_1d(narrow).view(np.uint32).copy().reshape(narrow.shape)
    bits -= np.abs(back) > np.abs(values)
    bits |= (back != values) & ~np.isnan(values)
    return bits.view(FLOAT32)


def cast(values: Array, dtype: DType) -> Array:
    """The values converted to another storage type: `round_to` for floats, saturation for integers.  [TN-CAST-1..5]

    float -> integer: to nearest, ties to even, then clipped to the target's range (infinities too).
    integer -> integer: clipped. anything -> bool: is it nonzero (NaN is). bool -> anything: 0 and 1.
    Pure; may return `values` itself. Raises DeviceError for NaN -> integer.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        if dtype == np.bool_:
            return np.asarray(values.astype(FLOAT64 if values.dtype in _COMPUTE else np.int64) != 0)
        if dtype in _COMPUTE:
            if values.dtype in _COMPUTE:
                return round_to(widen(values, _COMPUTE[values.dtype]), dtype)
            return round_to(values.astype(FLOAT64), dtype)
        return _to_integer(values, dtype)


def _to_integer(values: Array, dtype: DType) -> Array:
    low, high = (-8, 7) if dtype == INT4 else (0, 15) if dtype == UINT4 else _integer_range(dtype)
    if values.dtype in _COMPUTE:
        wide = values.astype(FLOAT64)
        if np.isnan(wide).any():
            raise DeviceError(f"to_dtype: NaN has no value in {dtype}; replace it first")
        wide = np.asarray(np.clip(np.rint(wide), low, high).astype(np.int64))
    else:
        wide = np.asarray(np.clip(values.astype(np.int64), low, high))
    return wide.astype(np.int8).astype(dtype) if dtype in (INT4, UINT4) else wide.astype(dtype)


def _integer_range(dtype: DType) -> tuple[int, int]:
    if dtype.kind not in "iu":
        raise DeviceError(f"to_dtype: {dtype} is not a type this project stores")
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)
