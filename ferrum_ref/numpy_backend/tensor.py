"""Tensors that are ndarrays, and tensors of 4-bit elements packed in one.

Clauses: TN-LIKE-*, TN-CAST-1..5, TN-FP8-*, TN-LAYOUT-*, TN-DATA-*, TN-PACKED-*.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import (
    Array,
    Fp8Format,
    Shape,
    TensorDataAccess,
    TensorLayout,
    TensorLike,
    TensorRef,
)
from ferrum_ref.kernels.rounding import FLOAT8, FLOAT8_E5M2, FLOAT32, DType, cast
from ferrum_ref.numpy_backend.dtypes import FOUR_BITS, data_type, element_type
from ferrum_ref.numpy_backend.elementwise import add
from ferrum_ref.numpy_backend.tensor_nibbles import Nibbles
from ferrum_ref.types.devices import DataType, Device


class NumpyTensor(TensorLike, TensorDataAccess, TensorLayout):
    """A handle on an ndarray. Views share memory with it; only `write_kv` and `clear` ever write.

    `array` is that ndarray. 4-bit arrays are refused: `wrap` packs them.
    """

    __slots__ = ("_is_view", "array")

    array: Array

    def __init__(self, array: Array, is_view: bool = False) -> None:
        if array.dtype.kind == "V" and array.dtype in FOUR_BITS:
            raise BackendError(f"NumpyTensor: got an array of {array.dtype}, one element a byte; wrap() packs it")
        self.array = array
        self._is_view = is_view

    def element_type(self) -> DType:
        """The numpy type of the elements: the types of `ml_dtypes` for BF16, FP8, INT4 and UINT4. Pure."""
        return self.array.dtype

    def shape(self) -> Shape:
        return self.array.shape

    def dtype(self) -> DataType:
        return data_type(self.element_type())

    def fp8_format(self) -> Fp8Format | None:
        """Which FP8 this is; None for every other type (extension). Pure.  [TN-FP8-1]"""
        element = self.element_type()
        return Fp8Format.E4M3FN if element == FLOAT8 else Fp8Format.E5M2 if element == FLOAT8_E5M2 else None

    def device(self) -> Device:
        return Device.CPU

    def ndim(self) -> int:
        return self.array.ndim

    def numel(self) -> int:
        return self.array.size

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    def strides(self) -> tuple[int, ...]:
        """Elements from one index of each axis to the next. Pure.  [TN-LAYOUT-1]"""
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def is_view(self) -> bool:
        """True when another tensor made the storage and this one shows it without a copy. Pure.  [TN-LAYOUT-2]"""
        return self._is_view

    def shares_memory_with(self, other: TensorRef) -> bool:
        """True when some element of both is the same piece of memory. Pure.  [TN-LAYOUT-3]"""
        if isinstance(other, PackedTensor):
            return other.shares_memory_with(self)
        return bool(np.shares_memory(self.array, array_of("shares_memory_with", other)))

    def contiguous(self) -> NumpyTensor:
        """Itself if contiguous, else a copy that is.  [TN-LAYOUT-4]"""
        return self if self.is_contiguous() else wrap(np.ascontiguousarray(self.array))

    def storage(self) -> Array:
        """The array that owns the memory, or stands for memory that is not numpy's. Pure."""
        owner = self.array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return owner

    def view(self, start: Shape, end: Shape) -> TensorRef:
        shape = self.shape()
        if len(start) != len(shape) or len(end) != len(shape):
            raise InvalidParameterError(
                f"view: start {start} and end {end}, expected one entry for each axis of {shape}"
            )
        if any(not 0 <= low <= high <= dim for low, high, dim in zip(start, end, shape, strict=True)):
            raise InvalidParameterError(
                f"view: box {start}..{end}, expected 0 <= start <= end <= {shape} on every axis"
            )
        return self.box(start, end)

    def box(self, start: Shape, end: Shape) -> NumpyTensor:
        """`view` with bounds that are known to be good."""
        index: tuple[Any, ...] = (*map(slice, start, end), ...)  # "...": 0-d stays an array
        return NumpyTensor(self.array[index], True)

    def narrowed(self, dim: int, start: int, length: int) -> NumpyTensor:
        """`length` entries of axis `dim` from `start`, known to be there; shares memory."""
        low, high = [0] * self.ndim(), list(self.shape())
        low[dim], high[dim] = start, start + length
        return self.box(tuple(low), tuple(high))

    def permuted(self, dims: Shape) -> NumpyTensor:
        """The axes in another order, known to be one; shares memory."""
        return NumpyTensor(self.array.transpose(dims), True)

    def picked(self, dim: int, index: int) -> NumpyTensor:
        """One index of axis `dim`, known to exist, the axis removed; shares memory."""
        return NumpyTensor(self.array[(slice(None),) * dim + (index, ...)], True)

    def reshape(self, shape: Shape) -> TensorRef:
        if not shape or min(shape) >= 0:  # numpy takes any negative dim for -1
            try:
                return self._reshaped(tuple(shape))
            except ValueError:
                pass  # told below in this project's words
        raise ShapeError(
            f"reshape: {self.shape()} to {tuple(shape)}, expected dims of 0 or more and {self.numel()} elements"
        )

    def _reshaped(self, shape: Shape) -> NumpyTensor:
        source = self.array
        array = source.reshape(shape)
        base = array.base  # numpy's note of whose memory this is: the source's, or a copy's
        return NumpyTensor(array, base is source or (base is not None and base is source.base) or array.size == 0)

    def to_cpu(self) -> TensorRef:
        return self

    def to_device(self, device: Device) -> TensorRef:
        check_device("to_device", device)
        return self

    def to_dtype(self, dtype: DataType, *, fp8: Fp8Format | None = None) -> TensorRef:
        """The values rounded to `dtype`; `fp8` (extension) names the format of FP8.  [TN-CAST-1..5, TN-FP8-1]

        An FP8 tensor keeps its format unless another is named. May return self.
        Raises DeviceError for NaN to an integer; InvalidParameterError for a format with another type than FP8.
        """
        if fp8 is None and dtype is DataType.FP8:
            fp8 = self.fp8_format()
        target = element_type(dtype, fp8)
        return self if target == self.element_type() else wrap(np.asarray(cast(self.array, target), order="C"))

    def to_numpy(self) -> Array:
        """The array itself, not a copy: read it, do not write it.  [TN-LIKE-11]"""
        return self.array

    def data_f32(self) -> NDArray[np.float32] | None:
        if self.array.dtype != FLOAT32 or not self.is_contiguous():
            return None
        flat = self.array.reshape(-1).view()
        flat.flags.writeable = False
        return flat

    def data_bytes(self) -> memoryview | None:
        return self.array.reshape(-1).view(np.uint8).data.toreadonly() if self.is_contiguous() else None

    def to_vec_u8(self) -> bytes:
        return self.array.tobytes()

    def clear(self) -> None:
        """Zero in place, for the memory manager. Raises BackendError for memory that may not be written."""
        if not self.array.flags.writeable:
            raise BackendError("clear: the tensor's memory may not be written; copy it with from_tensor")
        self.array[...] = 0

    def __add__(self, other: object) -> TensorRef:
        if not isinstance(other, NumpyTensor):
            return NotImplemented
        return NumpyTensor(add(self.array, other.array))

    def __repr__(self) -> str:
        return f"NumpyTensor(shape={self.shape()}, dtype={self.element_type()})"


class PackedTensor(NumpyTensor):
    """A handle on 4-bit elements, two to a byte. Views may start anywhere and share the bytes.  [TN-PACKED-1..5]

    `array` unpacks: a new read-only array, one element a byte, at every call. `store` writes.
    """

    __slots__ = ("_element", "nibbles")

    def __init__(self, nibbles: Nibbles, element: DType, is_view: bool = False) -> None:
        self.nibbles = nibbles
        self._element = element
        self._is_view = is_view

    @property
    def array(self) -> Array:  # type: ignore[override]
        unpacked = self.unpacked()
        unpacked.flags.writeable = False
        return unpacked

    def unpacked(self) -> Array:
        """The elements as a new array, one a byte, that the caller may write."""
        return self.nibbles.read().view(self._element)

    def store(self, values: Array) -> None:
        """Set every element; values of this shape and element type, one a byte. Mutates the tensor and its sharers.

        Raises BackendError for memory that may not be written.
        """
        self.nibbles.write(np.asarray(values, order="C").view(np.uint8))

    def element_type(self) -> DType:
        return self._element

    def shape(self) -> Shape:
        return self.nibbles.shape

    def ndim(self) -> int:
        return len(self.nibbles.shape)

    def numel(self) -> int:
        return math.prod(self.nibbles.shape)

    def is_contiguous(self) -> bool:
        return self.nibbles.is_contiguous()

    def strides(self) -> tuple[int, ...]:
        return self.nibbles.strides

    def shares_memory_with(self, other: TensorRef) -> bool:
        if isinstance(other, PackedTensor):
            return self.nibbles.shares_memory_with(other.nibbles)
        return bool(np.shares_memory(self.nibbles.storage, array_of("shares_memory_with", other)))

    def storage(self) -> Array:
        return self.nibbles.storage

    def box(self, start: Shape, end: Shape) -> NumpyTensor:
        return PackedTensor(self.nibbles.box(tuple(start), tuple(end)), self._element, True)

    def permuted(self, dims: Shape) -> NumpyTensor:
        return PackedTensor(self.nibbles.permuted(tuple(dims)), self._element, True)

    def picked(self, dim: int, index: int) -> NumpyTensor:
        return PackedTensor(self.nibbles.picked(dim, index), self._element, True)

    def _reshaped(self, shape: Shape) -> NumpyTensor:
        if math.prod(shape) != self.numel():
            raise ValueError
        shared = self.nibbles.reshaped(shape)
        if shared is not None:
            return PackedTensor(shared, self._element, True)
        return PackedTensor(Nibbles.packed(self.nibbles.read().reshape(shape)), self._element)

    def data_bytes(self) -> memoryview | None:
        in_place = self.nibbles.bytes_in_place()
        return None if in_place is None else in_place.data.toreadonly()

    def to_vec_u8(self) -> bytes:
        return Nibbles.packed(self.nibbles.read()).storage.tobytes()

    def clear(self) -> None:
        self.nibbles.write(np.zeros(self.nibbles.shape, np.uint8))


def wrap(array: Array) -> NumpyTensor:
    """The array as a tensor: without a copy, but 4-bit elements are packed.  [TN-PACKED-1]"""
    if array.dtype.kind == "V" and array.dtype in FOUR_BITS:
        return PackedTensor(Nibbles.packed(np.asarray(array, order="C").view(np.uint8)), array.dtype)
    return NumpyTensor(array)


def tensor_of(operation: str, tensor: TensorRef) -> NumpyTensor:
    """The argument, known to be this backend's. Raises BackendError for another backend's.  [BK-NUMPY-4]"""
    if isinstance(tensor, NumpyTensor):
        return tensor
    raise BackendError(
        f"{operation}: got {_describe(tensor)}, expected a NumpyTensor; bring it over with from_numpy(t.to_numpy())"
    )


def array_of(operation: str, tensor: TensorRef) -> Array:
    """The array behind one of this backend's tensors; 4-bit elements unpacked, read-only.  [BK-NUMPY-4]

    Raises BackendError for another backend's.
    """
    if type(tensor) is NumpyTensor:
        return tensor.array
    return tensor_of(operation, tensor).array


def check_device(operation: str, device: Device | None) -> None:
    """Raises DeviceError for any device but the CPU.  [TN-LIKE-5]"""
    if device is not None and device != Device.CPU:
        raise DeviceError(f"{operation}: device {device}, expected cpu; the numpy backend has no other device")


def _describe(tensor: Any) -> str:
    return f"a {type(tensor).__module__}.{type(tensor).__name__}"
