"""Element types, and how values go from one to another.

16-bit floats are converted by kernels; fp8, which is stored and converted but computed with as float32, and integers by
numpy. Rounding is to nearest, ties to even, everywhere.
Clauses: BK-NCPU-6..7 (specs/backend_numba.md), TN-CAST-1..5, TN-DTYPE-2 (specs/tensor.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.floats import round_all, widen_all
from ferrum_numba.cpu.vector import BF16, F16, F32
from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.types.devices import DataType

Array: TypeAlias = NDArray[Any]
Float32: TypeAlias = NDArray[np.float32]

FLOAT32: Final = np.dtype(np.float32)
FLOAT64: Final = np.dtype(np.float64)
FLOAT16: Final = np.dtype(np.float16)
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
FLOAT8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_MAX: Final = 448.0

NUMPY_TYPES: Final[Mapping[DataType, np.dtype[Any]]] = MappingProxyType(
    {
        DataType.FP32: FLOAT32,
        DataType.FP16: FLOAT16,
        DataType.BF16: BFLOAT16,
        DataType.FP8: FLOAT8,
        DataType.INT32: np.dtype(np.int32),
        DataType.INT16: np.dtype(np.int16),
        DataType.INT8: np.dtype(np.int8),
        DataType.UINT32: np.dtype(np.uint32),
        DataType.UINT16: np.dtype(np.uint16),
        DataType.UINT8: np.dtype(np.uint8),
        DataType.BOOL: np.dtype(np.bool_),
    }
)
DATA_TYPES: Final[Mapping[np.dtype[Any], DataType]] = MappingProxyType(
    {theirs: ours for ours, theirs in NUMPY_TYPES.items()}
)
FLOATS: Final = frozenset({FLOAT32, FLOAT16, BFLOAT16, FLOAT8})
KINDS: Final[Mapping[np.dtype[Any], int]] = MappingProxyType({FLOAT32: F32, FLOAT16: F16, BFLOAT16: BF16})


def numpy_type(dtype: DataType, operation: str) -> np.dtype[Any]:
    """The numpy type of `dtype`. Pure. Raises DeviceError for INT4 and UINT4, which are not stored here."""
    try:
        return NUMPY_TYPES[dtype]
    except KeyError:
        known = ", ".join(str(known) for known in NUMPY_TYPES)
        raise DeviceError(
            f"{operation}: dtype: got {dtype}, expected one of {known}; keep packed 4-bit data as uint8"
        ) from None


def require_float(array: Array, operation: str) -> None:
    """Raises BackendError unless the array holds fp32, fp16, bf16 or fp8."""
    if array.dtype not in FLOATS:
        raise BackendError(
            f"{operation}: element type {DATA_TYPES.get(array.dtype, array.dtype)}, expected fp32, fp16, bf16 or fp8; "
            "convert with to_dtype"
        )


def run_of(array: Array) -> Array:
    """The array with its elements in one row-major run: itself, or a copy."""
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def computable(array: Array, operation: str) -> Array:
    """The array in one run and in a type that kernels read: itself, a copy, or float32 for fp8.

    Raises BackendError for elements that are no floats.
    """
    if array.dtype not in KINDS:
        require_float(array, operation)
        return run_of(array.astype(FLOAT32))
    return run_of(array)


def widen(array: Array, operation: str) -> Float32:
    """The values as float32, exactly; itself if it holds float32 already. Raises BackendError for non-floats."""
    if array.dtype == FLOAT32:
        return array
    require_float(array, operation)
    if array.dtype == FLOAT8:
        return array.astype(FLOAT32)
    source, target = run_of(array), np.empty(array.shape, FLOAT32)
    widen_all(address_of(source), KINDS[array.dtype], address_of(target), source.size)
    return target


def round_to(values: Array, dtype: np.dtype[Any]) -> Array:
    """float32 or float64 values rounded once to a float type. Pure; may return `values`.

    Overflow gives infinity in fp16 and bf16, and +-448 in fp8, for infinities too; NaN stays.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        if values.dtype == FLOAT64:
            values = values.astype(FLOAT32) if dtype == FLOAT32 else odd_float32(values)
            return round_to(values, dtype)
        if dtype == FLOAT8:
            return np.asarray(np.clip(values, -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8))
    source, target = run_of(values), np.empty(values.shape, dtype)
    round_all(address_of(source), address_of(target), KINDS[dtype], source.size)
    return target


def odd_float32(values: NDArray[np.float64]) -> Float32:
    """float64 cut to float32 with the last bit set where that loses something: rounding it again rounds once. Pure.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums", rounding to odd.
    """
    narrow = np.atleast_1d(values.astype(FLOAT32))
    back, wide = narrow.astype(FLOAT64), np.atleast_1d(values)
    bits = narrow.view(np.uint32)
    bits -= np.abs(back) > np.abs(wide)
    bits |= (back != wide) & ~np.isnan(wide)
    return narrow.reshape(values.shape)


def cast(values: Array, dtype: np.dtype[Any]) -> Array:
    """The values converted to another stored type; itself if it has that type. Pure.  [TN-CAST-1..5]

    float -> integer: to nearest, ties to even, clipped to the target's range. integer -> integer: clipped.
    anything -> bool: is it nonzero (NaN is). bool -> anything: 0 and 1. Raises DeviceError for NaN -> integer.
    """
    if values.dtype == dtype:
        return values
    is_float = values.dtype in FLOATS or values.dtype == FLOAT64
    if is_float and dtype in FLOATS:
        return round_to(values if values.dtype == FLOAT64 else widen(values, "to_dtype"), dtype)
    with np.errstate(all="ignore"):
        wide = values.astype(FLOAT64 if is_float else np.int64)
        if dtype == np.bool_:
            return np.asarray(wide != 0)
        if dtype in FLOATS:
            return round_to(wide.astype(FLOAT64), dtype)
        limits = np.iinfo(dtype)
        if is_float:
            if np.isnan(wide).any():
                raise DeviceError(f"to_dtype: NaN has no value in {DATA_TYPES[dtype]}; replace it first")
            wide = np.clip(np.rint(wide), limits.min, limits.max).astype(np.int64)
        return np.asarray(np.clip(wide, limits.min, limits.max).astype(dtype))


def common_type(operation: str, a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    """The element type of a result of two operands.  [TN-DTYPE-2]

    Equal float types stay. Two floats: the wider; fp16 with bf16 is fp32. Float with integer or bool: the float.
    Two integers: numpy's common type. Pure. Raises BackendError where none fits: bool with bool, signed with uint32.
    """
    if a in FLOATS or b in FLOATS:
        if a == b or b not in FLOATS:
            return a
        if a not in FLOATS:
            return b
        return FLOAT32 if a.itemsize == b.itemsize else max(a, b, key=lambda dtype: dtype.itemsize)
    common = np.promote_types(a, b)
    if common not in DATA_TYPES or common == np.bool_:
        raise BackendError(
            f"{operation}: no common element type for {DATA_TYPES[a]} and {DATA_TYPES[b]}; convert one with to_dtype"
        )
    return common
