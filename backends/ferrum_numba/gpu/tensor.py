"""NumbaTensor: a flat device array seen through shape and strides.   Clause: BK-NCUDA-4."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.gpu import storage
from ferrum_numba.gpu.kernels.copy import fill
from ferrum_numba.gpu.machine import DeviceArray
from ferrum_numba.gpu.runtime import Runtime
from ferrum_ref.errors import DeviceError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.tensor import Shape, TensorLike
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode


class NumbaTensor(TensorLike):
    """Elements of `array` from `offset` on, `strides` apart (counted in elements).  [BK-NCUDA-4]

    Slices, transposes and reshapes share the array; it is freed with its last tensor.
    """

    __slots__ = ("_data_type", "_shape", "array", "offset", "runtime", "strides")

    def __init__(
        self,
        runtime: Runtime,
        array: DeviceArray,
        data_type: DataType,
        shape: Shape,
        strides: Shape | None = None,
        offset: int = 0,
    ) -> None:
        self.runtime, self.array, self._data_type = runtime, array, data_type
        self._shape, self.offset = tuple(shape), offset
        self.strides = row_major(self._shape) if strides is None else strides

    @classmethod
    def of_host(cls, runtime: Runtime, host: NDArray[Any], operation: str) -> NumbaTensor:
        """A copy of a host array on the device. Raises DeviceError for an element type without a DataType here."""
        data_type = storage.data_type_of(host.dtype, operation)
        native = np.ascontiguousarray(host, dtype=storage.HOST_TYPES[data_type]).reshape(-1)
        flat = native.view(storage.carrier(data_type))
        return cls(runtime, runtime.machine.upload(flat if flat.size else flat.dtype.type([0])), data_type, host.shape)

    @classmethod
    def empty(cls, runtime: Runtime, shape: Shape, data_type: DataType) -> NumbaTensor:
        """A tensor that an operation is about to fill."""
        return cls(runtime, runtime.machine.empty(math.prod(shape), storage.carrier(data_type)), data_type, shape)

    @classmethod
    def zeros(cls, runtime: Runtime, shape: Shape, data_type: DataType) -> NumbaTensor:
        """Zeros (False) of any element type."""
        result = cls.empty(runtime, shape, data_type)
        bits = storage.BITS[storage.carrier(data_type).itemsize]
        runtime.launch_each(fill, (bits,), result.numel(), result.array.view(bits), 0, result.numel())
        return result

    def shape(self) -> Shape:
        return self._shape

    def dtype(self) -> DataType:
        return self._data_type

    def device(self) -> Device:
        return self.runtime.machine.device

    def is_contiguous(self) -> bool:
        expected = row_major(self._shape)
        return self.numel() == 0 or all(
            dim == 1 or ours == theirs for dim, ours, theirs in zip(self._shape, self.strides, expected, strict=True)
        )

    def flat(self) -> DeviceArray:
        """The elements in row-major order as one flat device array: a view of contiguous ones, else a copy."""
        count = self.numel()
        if not self.is_contiguous():
            return self.runtime.gathered(
                self.array, self._shape, self.strides, self.offset, storage.carrier(self._data_type)
            )
        if count == 0 or (self.offset == 0 and self.array.size == count):
            return self.array
        return self.array[self.offset : self.offset + count]

    def contiguous(self) -> NumbaTensor:
        """Self, or a contiguous copy."""
        return self if self.is_contiguous() else NumbaTensor(self.runtime, self.flat(), self._data_type, self._shape)

    def view(self, start: Shape, end: Shape) -> NumbaTensor:
        """The box start[i]:end[i], sharing storage. Raises InvalidParameterError outside 0 <= start <= end <= dim."""
        if len(start) != self.ndim() or len(end) != self.ndim():
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected one entry for each axis of {self._shape}"
            )
        if any(not 0 <= low <= high <= dim for low, high, dim in zip(start, end, self._shape, strict=True)):
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected 0 <= start <= end <= {self._shape} "
                "on every axis"
            )
        offset = self.offset + sum(low * stride for low, stride in zip(start, self.strides, strict=True))
        shape = tuple(high - low for low, high in zip(start, end, strict=True))
        return NumbaTensor(self.runtime, self.array, self._data_type, shape, self.strides, offset)

    def picked(self, dim: int, index: int) -> NumbaTensor:
        """Entry `index` of axis `dim`, the axis removed; shares storage. Pure."""
        shape, strides = list(self._shape), list(self.strides)
        del shape[dim]
        offset = self.offset + index * strides.pop(dim)
        return NumbaTensor(self.runtime, self.array, self._data_type, tuple(shape), tuple(strides), offset)

    def permuted(self, dims: Shape) -> NumbaTensor:
        """The axes in another order, sharing storage. Pure."""
        shape, strides = tuple(self._shape[dim] for dim in dims), tuple(self.strides[dim] for dim in dims)
        return NumbaTensor(self.runtime, self.array, self._data_type, shape, strides, self.offset)

    def broadcast(self, shape: Shape) -> NumbaTensor:
        """The same elements repeated to `shape`, to which this shape broadcasts; shares storage. Pure."""
        missing = len(shape) - self.ndim()
        own = zip(self._shape, self.strides, shape[missing:], strict=True)
        strides = (
            *(0 for _ in range(missing)),
            *(0 if dim == 1 and wanted != 1 else step for dim, step, wanted in own),
        )
        return NumbaTensor(self.runtime, self.array, self._data_type, shape, strides, self.offset)

    def reshape(self, shape: Shape) -> NumbaTensor:
        """The same elements in row-major order; shares storage if contiguous. Raises BackendError otherwise."""
        if math.prod(shape) != self.numel() or any(dim < 0 for dim in shape):
            raise ShapeError(
                f"reshape: shape {tuple(shape)} for a tensor of shape {self._shape}, expected {self.numel()} elements "
                "and no negative dimension"
            )
        source = self.contiguous()
        return NumbaTensor(self.runtime, source.array, self._data_type, shape, None, source.offset)

    def to_cpu(self) -> NumbaTensor:
        """Self under the simulator. Raises UnsupportedError on a GPU: this backend has no tensors on the host."""
        if self.device() == Device.CPU:
            return self
        raise UnsupportedError("to_cpu: the numba-cuda backend keeps tensors on its GPU; take to_numpy()")

    def to_device(self, device: Device) -> NumbaTensor:
        """Self; there is one device. Raises DeviceError for another."""
        if device != self.device():
            raise DeviceError(
                f"to_device: device: got {device}, expected {self.device()}, the device of this backend; "
                "make a backend there and hand over to_numpy()"
            )
        return self

    def to_dtype(self, dtype: DataType) -> NumbaTensor:
        """The same values rounded to `dtype`; self if they have it.  [BK-NCUDA-10]

        Raises DeviceError for a type that this backend does not hold, and for NaN to an integer.
        """
        from ferrum_numba.gpu.casting import cast

        return self if dtype is self._data_type else cast(self, dtype)

    def to_numpy(self) -> NDArray[Any]:
        """A copy of the elements on the host in their own type, bf16 as `ml_dtypes.bfloat16`."""
        host = storage.HOST_TYPES[self._data_type]
        if self.numel() == 0:
            return np.zeros(self._shape, host)
        return self.runtime.machine.download(self.flat()).view(host).reshape(self._shape)

    def to_vec_f32(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> NDArray[np.float32]:
        """All elements, flat in row-major order, as a float32 copy (D-12); UPSTREAM: one row."""
        return super().to_vec_f32(parity_mode=parity_mode)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The memory for other CUDA libraries, without a copy; AttributeError under the simulator and for bf16."""
        interface = getattr(self.array, "__cuda_array_interface__", None)
        if interface is None or self._data_type is DataType.BF16:
            raise AttributeError(f"NumbaTensor of {self._data_type} on {self.device()} has no CUDA array interface")
        size = self.array.dtype.itemsize
        address = interface["data"][0] + self.offset * size
        strides = tuple(stride * size for stride in self.strides)
        return {**interface, "shape": self._shape, "strides": strides, "data": (address, False)}

    def __repr__(self) -> str:
        return f"NumbaTensor(shape={self._shape}, dtype={self._data_type}, device={self.device()})"


def row_major(shape: Shape) -> Shape:
    """The strides, in elements, of a contiguous array. Pure."""
    strides, step = [], 1
    for dim in reversed(shape):
        strides.append(step)
        step *= dim
    return tuple(reversed(strides))
