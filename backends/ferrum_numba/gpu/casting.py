"""Values in another type: floats among each other on the device, everything else on the host.

Clause: BK-NCUDA-10 (specs/backend_numba_cuda.md), TN-CAST-1..5 (specs/tensor.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.gpu.kernels.elementwise import packs_of, unary
from ferrum_numba.gpu.storage import HOST_TYPES, STORAGES, host_type
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import DeviceError
from ferrum_ref.types.devices import DataType

FLOAT8_MAX = 448.0


def cast(tensor: NumbaTensor, dtype: DataType) -> NumbaTensor:
    """The values rounded once to `dtype`, to nearest, ties to even. Pure.

    float -> integer: clipped to the target's range. integer -> integer: clipped. anything -> bool: is it nonzero.
    Raises DeviceError for a type that this backend does not hold and for NaN -> integer.
    """
    host_type(dtype, "to_dtype")
    if tensor.dtype() in STORAGES and dtype in STORAGES:
        return cast_float(tensor, dtype)
    return NumbaTensor.of_host(tensor.runtime, cast_host(tensor.to_numpy(), dtype), "to_dtype")


def cast_float(tensor: NumbaTensor, dtype: DataType) -> NumbaTensor:
    """A float tensor in another float type. Pure."""
    if tensor.dtype() is dtype:
        return tensor
    result = NumbaTensor.empty(tensor.runtime, tensor.shape(), dtype)
    types = ("cast", STORAGES[tensor.dtype()], STORAGES[dtype])
    tensor.runtime.launch_each(unary, types, packs_of(tensor.numel()), tensor.flat(), result.array, tensor.numel())
    return result


def cast_host(values: NDArray[Any], dtype: DataType) -> NDArray[Any]:
    """`cast` for host arrays. Pure. Raises DeviceError for NaN -> integer."""
    target = HOST_TYPES[dtype]
    is_float = values.dtype.kind not in "iub"
    with np.errstate(all="ignore"):  # signalling NaNs, overflow to infinity
        wide = values.astype(np.float64 if is_float else np.int64)
        if dtype is DataType.BOOL:
            return np.asarray(wide != 0)
        if dtype is DataType.BF16:
            return odd_float32(wide.astype(np.float64)).astype(target)
        if dtype is DataType.FP8:
            return np.clip(odd_float32(wide.astype(np.float64)), -FLOAT8_MAX, FLOAT8_MAX).astype(target)
        if dtype in STORAGES:
            return wide.astype(target)
        if is_float and bool(np.isnan(wide).any()):
            raise DeviceError(f"to_dtype: NaN has no value in {dtype}; replace it first")
        limits = np.iinfo(target)
        return np.clip(np.rint(wide) if is_float else wide, limits.min, limits.max).astype(target)


def odd_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 cut to float32 with the last bit set when inexact: rounding that again equals rounding once. Pure.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem on rounding to odd.
    """
    narrow = values.astype(np.float32)
    back = narrow.astype(np.float64)
    bits = narrow.view(np.int32) - (np.abs(back) > np.abs(values)).astype(np.int32)
    inexact = (back != values) & ~np.isnan(values)
    odd: NDArray[np.float32] = (bits | inexact.astype(np.int32)).view(np.float32)
    return odd
