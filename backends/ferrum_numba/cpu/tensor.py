"""NumbaTensor: a numpy array behind the tensor contract.  Clauses: BK-NCPU-6..7 (specs/backend_numba.md), TN-LIKE-*."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu import conversion
from ferrum_ref.errors import DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorLike
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode


class NumbaTensor(TensorLike):
    """A handle on `data`, an array of one of the element types in `conversion.NUMPY_TYPES`.  [BK-NCPU-6]"""

    __slots__ = ("data",)

    def __init__(self, data: NDArray[Any]) -> None:
        self.data = data

    def shape(self) -> Shape:
        return self.data.shape

    def dtype(self) -> DataType:
        return conversion.DATA_TYPES[self.data.dtype]

    def device(self) -> Device:
        return Device.CPU

    def is_contiguous(self) -> bool:
        return self.data.flags.c_contiguous

    def view(self, start: Shape, end: Shape) -> NumbaTensor:
        """The box start[i]:end[i], sharing storage. Raises InvalidParameterError outside 0 <= start <= end <= dim."""
        shape = self.data.shape
        if len(start) != len(shape) or len(end) != len(shape):
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected one entry for each axis of {shape}"
            )
        if not all(0 <= low <= high <= dim for low, high, dim in zip(start, end, shape, strict=True)):
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected 0 <= start <= end <= {shape} on every axis"
            )
        return NumbaTensor(self.data[tuple(map(slice, start, end))])

    def reshape(self, shape: Shape) -> NumbaTensor:
        """The same elements in row-major order; shares storage where strides allow. Raises BackendError otherwise."""
        if math.prod(shape) != self.data.size or any(dim < 0 for dim in shape):
            raise ShapeError(
                f"reshape: shape {tuple(shape)} for a tensor of shape {self.data.shape}, expected {self.data.size} "
                "elements and no negative dimension"
            )
        return NumbaTensor(self.data.reshape(shape))

    def to_cpu(self) -> NumbaTensor:
        return self

    def to_device(self, device: Device) -> NumbaTensor:
        """Itself. Raises DeviceError for any device but the CPU."""
        check_device(device, "to_device")
        return self

    def to_dtype(self, dtype: DataType) -> NumbaTensor:
        """The same values rounded to `dtype`; itself if it has them.  [BK-NCPU-7]"""
        target = conversion.numpy_type(dtype, "to_dtype")
        return self if self.data.dtype == target else NumbaTensor(conversion.cast(self.data, target))

    def to_numpy(self) -> NDArray[Any]:
        """The array itself, bf16 as `ml_dtypes.bfloat16`: no copy.  [BK-NCPU-6]"""
        return self.data

    def to_vec_f32(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> NDArray[np.float32]:
        """All elements, flat in row-major order, as a float32 copy (D-12); UPSTREAM: one row."""
        if parity_mode is ParityMode.UPSTREAM:
            return super().to_vec_f32(parity_mode=parity_mode)
        return np.array(conversion.cast(self.data, conversion.FLOAT32), dtype=np.float32).reshape(-1)

    def __repr__(self) -> str:
        return f"NumbaTensor(shape={self.shape()}, dtype={self.dtype()})"


def check_device(device: Device, operation: str) -> None:
    """Raises DeviceError for any device but the CPU."""
    if device.kind != "cpu":
        raise DeviceError(
            f"{operation}: device: got {device}, expected cpu, all that this backend drives; "
            "the numba-cuda backend computes on GPUs"
        )
