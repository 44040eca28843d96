"""A float tensor that calls itself FP32 and holds whatever precision the run computes in.   Clause: PA-WIDE-1."""

from __future__ import annotations

from typing import Any

import numpy as np

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.tensor import Shape, TensorLike, TensorRef
from ferrum_ref.parity.units import Array
from ferrum_ref.types.devices import DataType, Device


class WideTensor(TensorLike):
    """Weights and tables stay as they are stored until an operation widens them; results are float32 or float64.

    `to_numpy` gives that array: float64 in a float64 run. Integers and packed bytes have their own types.
    """

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array = array

    def shape(self) -> Shape:
        return self.array.shape

    def dtype(self) -> DataType:
        if self.array.dtype.kind in "iu":
            return DataType[self.array.dtype.name.upper()]
        return DataType.FP32

    def device(self) -> Device:
        return Device.CPU

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    def view(self, start: Shape, end: Shape) -> TensorRef:
        shape = self.array.shape
        if len(start) != len(shape) or len(end) != len(shape):
            raise InvalidParameterError(f"view: start {start} and end {end}, expected one entry per axis of {shape}")
        if any(not 0 <= low <= high <= dim for low, high, dim in zip(start, end, shape, strict=True)):
            raise InvalidParameterError(f"view: box {start}..{end}, expected 0 <= start <= end <= {shape}")
        index: tuple[Any, ...] = (*map(slice, start, end), ...)
        return WideTensor(self.array[index])

    def reshape(self, shape: Shape) -> TensorRef:
        if any(dim < 0 for dim in shape) or int(np.prod(shape)) != self.array.size:
            raise ShapeError(f"reshape: {self.array.shape} to {tuple(shape)}, expected {self.array.size} elements")
        return WideTensor(self.array.reshape(shape))

    def to_cpu(self) -> TensorRef:
        return self

    def to_device(self, device: Device) -> TensorRef:
        if device != Device.CPU:
            raise DeviceError(f"to_device: {device}, expected cpu; the float64 run has no other device")
        return self

    def to_dtype(self, dtype: DataType) -> TensorRef:
        """Itself.  Raises UnsupportedError for any type but its own: a float64 run rounds to nothing."""
        if dtype is not self.dtype():
            raise UnsupportedError(f"to_dtype: {dtype}, expected {self.dtype()}; the float64 run rounds to nothing")
        return self

    def to_numpy(self) -> Array:
        return self.array


def array_of(operation: str, tensor: TensorRef) -> Array:
    """The array behind one of these tensors.  Raises BackendError for another backend's."""
    if not isinstance(tensor, WideTensor):
        raise BackendError(f"{operation}: got a {type(tensor).__name__}, expected a tensor of the float64 run")
    return tensor.array
