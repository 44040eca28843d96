"""A tensor that is an ndarray.   Clauses: TN-LIKE-1..9, TN-CAST-1..5."""

from __future__ import annotations

from typing import Any

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorLike, TensorRef
from ferrum_ref.kernels.rounding import cast
from ferrum_ref.numpy_backend.dtypes import ELEMENT_TYPES, data_type
from ferrum_ref.numpy_backend.elementwise import add
from ferrum_ref.types.devices import DataType, Device


class NumpyTensor(TensorLike):
    """A handle on an ndarray. Views and reshapes share memory with it; only `write_kv` ever writes."""

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array = array

    def shape(self) -> Shape:
        return self.array.shape

    def dtype(self) -> DataType:
        return data_type(self.array.dtype)

    def device(self) -> Device:
        return Device.CPU

    def ndim(self) -> int:
        return self.array.ndim

    def numel(self) -> int:
        return self.array.size

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    def view(self, start: Shape, end: Shape) -> TensorRef:
        shape = self.array.shape
        if len(start) != len(shape) or len(end) != len(shape):
            raise InvalidParameterError(
                f"view: start {start} and end {end}, expected one entry for each axis of {shape}"
            )
        if any(not 0 <= low <= high <= dim for low, high, dim in zip(start, end, shape)):
            raise InvalidParameterError(
                f"view: box {start}..{end}, expected 0 <= start <= end <= {shape} on every axis"
            )
        return NumpyTensor(self.array[(*map(slice, start, end),)])

    def reshape(self, shape: Shape) -> TensorRef:
        if not shape or min(shape) >= 0:  # numpy takes any negative dim for -1
            try:
                return NumpyTensor(self.array.reshape(shape))
            except ValueError:
                pass  # told below in this project's words
        raise ShapeError(
            f"reshape: {self.array.shape} to {tuple(shape)}, expected dims of 0 or more and {self.array.size} elements"
        )

    def to_cpu(self) -> TensorRef:
        return self

    def to_device(self, device: Device) -> TensorRef:
        check_device("to_device", device)
        return self

    def to_dtype(self, dtype: DataType) -> TensorRef:
        array = cast(self.array, ELEMENT_TYPES[dtype])
        return self if array is self.array else NumpyTensor(array)

    def to_numpy(self) -> Array:
        """The array itself, not a copy: read it, do not write it."""
        return self.array

    def __add__(self, other: object) -> TensorRef:
        if not isinstance(other, NumpyTensor):
            return NotImplemented
        return NumpyTensor(add(self.array, other.array))

    def __repr__(self) -> str:
        return f"NumpyTensor(shape={self.array.shape}, dtype={self.array.dtype})"


def array_of(operation: str, tensor: TensorRef) -> Array:
    """The array behind one of this backend's tensors. Raises BackendError for another backend's.  [BK-NUMPY-4]"""
    if type(tensor) is NumpyTensor or isinstance(tensor, NumpyTensor):
        return tensor.array
    raise BackendError(
        f"{operation}: got {_describe(tensor)}, expected a NumpyTensor; bring it over with from_numpy(t.to_numpy())"
    )


def check_device(operation: str, device: Device | None) -> None:
    """Raises DeviceError for any device but the CPU.  [TN-LIKE-5]"""
    if device is not None and device != Device.CPU:
        raise DeviceError(f"{operation}: device {device}, expected cpu; the numpy backend has no other device")


def _describe(tensor: Any) -> str:
    return f"a {type(tensor).__module__}.{type(tensor).__name__}"
