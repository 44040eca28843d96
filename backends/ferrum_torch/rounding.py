"""Computing in float32, rounding once to the storage type, and converting between storage types.

Clauses: BK-TORCH-8..10 (specs/backend_torch.md), TN-CAST-1..5 (specs/tensor.md).
"""

from __future__ import annotations

import numpy as np
import torch

from ferrum_ref.errors import BackendError, DeviceError
from ferrum_torch.conversion import DATA_TYPES, NUMPY_TYPES, TO_NUMPY_TYPES

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn})
FLOAT8_MAX = 448.0


def widen(data: torch.Tensor, operation: str) -> torch.Tensor:
    """The values as float32, exactly; itself if it holds float32. Pure. Raises BackendError for non-floats."""
    if data.dtype is torch.float32:
        return data
    check_float(data, operation)
    return data.to(torch.float32)


def check_float(data: torch.Tensor, operation: str) -> None:
    """Raises BackendError for non-floats."""
    if data.dtype not in FLOATS:
        raise BackendError(
            f"{operation}: element type {DATA_TYPES.get(data.dtype, data.dtype)}, expected fp32, fp16, bf16 or fp8; "
            "convert with to_dtype"
        )


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 or float64 values rounded once to a float `dtype`, to nearest, ties to even. Pure; may return `values`.

    Overflow gives infinity in fp16 and bf16, and +-448 in fp8, for infinities too; NaN stays.
    """
    if values.dtype is dtype:
        return values
    if values.dtype is torch.float64 and dtype is not torch.float32:
        values = odd_float32(values)
    if dtype is torch.float8_e4m3fn:
        values = values.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return values.to(dtype)


def cast(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values converted to another storage type; itself if it has that type. Pure.

    float -> integer: to nearest, ties to even, clipped to the target's range. integer -> integer: clipped.
    anything -> bool: is it nonzero (NaN is). bool -> anything: 0 and 1. Raises DeviceError for NaN -> integer.
    """
    if data.dtype is dtype:
        return data
    is_float = data.dtype in FLOATS or data.dtype is torch.float64
    wide = data.to(torch.float64 if is_float else torch.int64)
    if dtype is torch.bool:
        return wide != 0
    if dtype in FLOATS:
        return round_to(wide.to(torch.float64), dtype)
    limits = torch.iinfo(dtype)
    if is_float:
        if bool(wide.isnan().any()):
            raise DeviceError(f"to_dtype: NaN has no value in {DATA_TYPES[dtype]}; replace it first")
        wide = wide.round().clamp(limits.min, limits.max).to(torch.int64)
    return wide.clamp(limits.min, limits.max).to(dtype)


def odd_float32(values: torch.Tensor) -> torch.Tensor:
    """float64 truncated to float32 with the last bit set when inexact: rounding that again equals rounding once. Pure.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem on rounding to odd.
    """
    narrow = values.to(torch.float32)
    back = narrow.to(torch.float64)
    bits = narrow.view(torch.int32) - (back.abs() > values.abs()).to(torch.int32)
    inexact = (back != values) & ~values.isnan()
    return (bits | inexact.to(torch.int32)).view(torch.float32)


def common_type(operation: str, a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The element type of a result of two operands.  [TN-DTYPE-2]

    Equal float types stay. Two floats: the wider; fp16 with bf16 is fp32. Float with integer or bool: the float.
    Two integers: numpy's common type. Pure. Raises BackendError where none fits: bool with bool, signed with uint32.
    """
    if a in FLOATS or b in FLOATS:
        if a is b or b not in FLOATS:
            return a
        if a not in FLOATS:
            return b
        return torch.float32 if a.itemsize == b.itemsize else max(a, b, key=lambda dtype: dtype.itemsize)
    common = NUMPY_TYPES.get(np.promote_types(TO_NUMPY_TYPES[a], TO_NUMPY_TYPES[b]), torch.bool)
    if common is torch.bool:
        raise BackendError(
            f"{operation}: no common element type for {DATA_TYPES[a]} and {DATA_TYPES[b]}; convert one with to_dtype"
        )
    return common
