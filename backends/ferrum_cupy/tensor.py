"""CupyTensor: an array of the device behind the tensor contract.  Clauses: BK-CUPY-5..6, TN-LIKE-*."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_cupy.machine import DeviceArray, Machine
from ferrum_cupy.storage import HOST_TYPES, array_type, cast
from ferrum_ref.errors import DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorLike
from ferrum_ref.types.devices import DataType, Device


class CupyTensor(TensorLike):
    """A handle on an array of one machine; `array` holds uint16 bits where the element type is BF16.  [BK-CUPY-5]"""

    __slots__ = ("array", "is_read_only", "kind", "machine")

    def __init__(self, machine: Machine, array: DeviceArray, kind: DataType, is_read_only: bool = False) -> None:
        self.machine, self.array, self.kind, self.is_read_only = machine, array, kind, is_read_only

    def shape(self) -> Shape:
        return tuple(self.array.shape)

    def dtype(self) -> DataType:
        return self.kind

    def device(self) -> Device:
        return self.machine.device

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def view(self, start: Shape, end: Shape) -> CupyTensor:
        """The box start[i]:end[i], sharing storage. Raises InvalidParameterError outside 0 <= start <= end <= dim."""
        shape = self.array.shape
        if len(start) != len(shape) or len(end) != len(shape):
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected one entry for each axis of {self.shape()}"
            )
        if any(not 0 <= low <= high <= dim for low, high, dim in zip(start, end, shape, strict=True)):
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected 0 <= start <= end <= {self.shape()} "
                "on every axis"
            )
        return self._of(self.array[tuple(slice(low, high) for low, high in zip(start, end, strict=True))])

    def reshape(self, shape: Shape) -> CupyTensor:
        """The same elements in row-major order; shares storage where strides allow. Raises BackendError otherwise."""
        if math.prod(shape) != self.array.size or any(dim < 0 for dim in shape):
            raise ShapeError(
                f"reshape: shape {tuple(shape)} for a tensor of shape {self.shape()}, "
                f"expected {self.array.size} elements and no negative dimension"
            )
        return self._of(self.array.reshape(tuple(shape)))

    def to_cpu(self) -> TensorLike:
        """Raises DeviceError on a GPU: this backend keeps nothing on the host; `to_numpy` gives a host array."""
        return self.to_device(Device.CPU)

    def to_device(self, device: Device) -> CupyTensor:
        """Self on its own device. Raises DeviceError for another: a backend of this kind drives one."""
        if device == self.machine.device:
            return self
        raise DeviceError(
            f"to_device: got {device}, expected {self.machine.device}, the one device of this backend; "
            "use to_numpy, and from_numpy of a backend there"
        )

    def to_dtype(self, dtype: DataType) -> CupyTensor:
        """The same values rounded to `dtype`; self if they have it.  [BK-CUPY-6]"""
        if dtype is self.kind:
            return self
        array_type(dtype, "to_dtype")
        with np.errstate(over="ignore", invalid="ignore"):
            return CupyTensor(self.machine, cast(self.machine.xp, self.array, self.kind, dtype), dtype)

    def to_numpy(self) -> NDArray[Any]:
        """The elements on the host in their own type, bf16 as `ml_dtypes.bfloat16`."""
        array: NDArray[Any] = np.asarray(self.machine.to_host(self.array)).view(HOST_TYPES[self.kind])
        if self.is_read_only:
            array = array.view()
            array.flags.writeable = False
        return array

    def _of(self, array: DeviceArray) -> CupyTensor:
        return CupyTensor(self.machine, array, self.kind, self.is_read_only)

    def __repr__(self) -> str:
        return f"CupyTensor(shape={self.shape()}, dtype={self.dtype()}, device={self.device()})"
