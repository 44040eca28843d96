"""Makes NumpyTensors.   Clauses: TN-FACTORY-1..8, TN-FP8-1, TN-MEMORY-2, TN-PACKED-1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, ResourceExhaustedError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Fp8Format, Shape, TensorFactory, TensorRef
from ferrum_ref.kernels.rounding import DType, cast
from ferrum_ref.numpy_backend.dtypes import FOUR_BITS, data_type, element_type
from ferrum_ref.numpy_backend.tensor import NumpyTensor, PackedTensor, array_of, check_device, tensor_of, wrap
from ferrum_ref.numpy_backend.tensor_memory import NumpyTensorMemoryManager
from ferrum_ref.numpy_backend.tensor_nibbles import Nibbles
from ferrum_ref.numpy_backend.tensor_shape import check_shape, storage_bytes
from ferrum_ref.types.devices import DataType, Device


class NumpyTensorFactory(TensorFactory):
    """Makes tensors on the CPU.

    It owns the generator that `uniform` and `normal` use when the call brings none, and the memory manager that counts
    the storage of what it makes. `fp8` says which format DataType.FP8 means here (D-07).
    """

    def __init__(
        self,
        rng: np.random.Generator | None = None,
        memory: NumpyTensorMemoryManager | None = None,
        fp8: Fp8Format = Fp8Format.E4M3FN,
    ) -> None:
        self._rng = rng if rng is not None else np.random.default_rng(0)
        self._memory = memory if memory is not None else NumpyTensorMemoryManager()
        self._fp8 = fp8

    def memory_manager(self) -> NumpyTensorMemoryManager:
        """Who counts what this factory makes (extension).  [TN-MEMORY-2]"""
        return self._memory

    def empty(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return self._filled("empty", np.zeros, shape, dtype, device)

    def zeros_like(self, tensor: TensorRef) -> TensorRef:
        source = tensor_of("zeros_like", tensor)
        return self._made(wrap(np.zeros(source.shape(), source.element_type())))

    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        shape = self._checked("from_slice", shape, dtype, device)
        try:
            with np.errstate(all="ignore"):
                values = np.array(data, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise BackendError(f"from_slice: data are no flat float32 values: {error}") from None
        if values.ndim != 1 or values.size != math.prod(shape):
            raise ShapeError(
                f"from_slice: data of shape {values.shape} for shape {tuple(shape)}, "
                f"expected {math.prod(shape)} flat values"
            )
        return self._made(wrap(cast(values.reshape(shape), self._element(dtype))))

    def to_device(self, tensor: TensorRef, device: Device) -> TensorRef:
        return tensor.to_device(device)

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> TensorRef:
        source = tensor_of("narrow", tensor)
        shape = source.shape()
        if not 0 <= dim < len(shape):
            raise ShapeError(f"narrow: axis {dim} of shape {shape}, expected 0 <= axis < {len(shape)}")
        if start < 0 or length < 0 or start + length > shape[dim]:
            raise ShapeError(
                f"narrow: start {start}, length {length} on axis {dim} of shape {shape}, "
                f"expected start + length <= {shape[dim]}"
            )
        return source.narrowed(dim, start, length)

    def reshape(self, tensor: TensorRef, shape: Shape) -> TensorRef:
        return tensor.reshape(shape)

    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return self._filled("zeros", np.zeros, shape, dtype, device)

    def ones(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return self._filled("ones", np.ones, shape, dtype, device)

    def uniform(
        self,
        shape: Shape,
        low: float,
        high: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> TensorRef:
        if not -math.inf < low <= high < math.inf:
            raise BackendError(f"uniform: low {low}, high {high}, expected finite low <= high")
        draw = (rng if rng is not None else self._rng).uniform
        return self._drawn("uniform", lambda dims: draw(low, high, dims), shape, dtype, device)

    def normal(
        self,
        shape: Shape,
        mean: float,
        std: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> TensorRef:
        if not 0 <= std < math.inf or not math.isfinite(mean):
            raise BackendError(f"normal: mean {mean}, std {std}, expected finite numbers and std >= 0")
        draw = (rng if rng is not None else self._rng).normal
        return self._drawn("normal", lambda dims: draw(mean, std, dims), shape, dtype, device)

    def from_tensor(self, tensor: TensorRef, device: Device) -> TensorRef:
        check_device("from_tensor", device)
        return self._made(wrap(array_of("from_tensor", tensor).copy()))

    def from_numpy(self, array: Array, device: Device | None = None) -> TensorRef:
        check_device("from_numpy", device)
        array = np.asarray(array)
        data_type(array.dtype)
        tensor = wrap(array)
        return self._made(tensor) if isinstance(tensor, PackedTensor) else tensor

    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> TensorRef:
        check_device("from_ids", device)
        values = np.asarray(ids) if len(ids) else np.empty(0, np.uint32)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise InvalidParameterError(
                f"from_ids: got {values.dtype} of shape {values.shape}, expected a flat list of integers"
            )
        if values.size and (values.min() < 0 or values.max() >= 2**32):
            raise InvalidParameterError(
                f"from_ids: ids reach from {values.min()} to {values.max()}, expected [0, 2**32)"
            )
        return self._made(NumpyTensor(values.astype(np.uint32)))

    def from_bytes(
        self, data: bytes | bytearray | memoryview, shape: Shape, dtype: DataType, device: Device | None = None
    ) -> TensorRef:
        """A tensor of these bytes, copied: the inverse of `to_vec_u8` (extension).  [TN-DATA-4]

        Raises BackendError for another number of bytes than the shape takes; InvalidParameterError for a BOOL byte
        other than 0 and 1, or padding after an odd number of 4-bit elements that is not 0.
        """
        check_device("from_bytes", device)
        shape = check_shape("from_bytes", shape, dtype)
        flat: NDArray[np.uint8] = np.frombuffer(data, np.uint8).copy()
        if flat.size != storage_bytes(shape, dtype):
            raise ShapeError(
                f"from_bytes: {flat.size} bytes for shape {shape} of {dtype}, expected {storage_bytes(shape, dtype)}"
            )
        element = self._element(dtype)
        if dtype is DataType.BOOL and (flat > 1).any():
            raise InvalidParameterError(f"from_bytes: byte {flat.max()} for bool, expected 0 or 1")
        if element not in FOUR_BITS:
            return self._made(NumpyTensor(flat.view(element).reshape(shape)))
        if math.prod(shape) % 2 and flat[-1] > 15:
            raise InvalidParameterError(f"from_bytes: padding {flat[-1] >> 4} after the last element, expected 0")
        return self._made(PackedTensor(Nibbles.over(flat, shape), element))

    def _element(self, dtype: DataType) -> DType:
        return element_type(dtype, self._fp8 if dtype is DataType.FP8 else None)

    def _filled(
        self, operation: str, make: Callable[[Shape, DType], Array], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        shape = self._checked(operation, shape, dtype, device)
        try:
            return self._made(wrap(make(shape, self._element(dtype))))
        except MemoryError:
            raise _no_memory(operation, shape, dtype) from None

    def _drawn(
        self, operation: str, draw: Callable[[Shape], Array], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        shape = self._checked(operation, shape, dtype, device)
        try:
            draws = np.asarray(draw(shape))
        except (MemoryError, ValueError):  # the draws are float64 and may be too many where their like in dtype is not
            raise _no_memory(operation, shape, dtype) from None
        return self._made(wrap(cast(draws, self._element(dtype))))

    def _made(self, tensor: NumpyTensor) -> NumpyTensor:
        self._memory.adopt(tensor.storage())
        return tensor

    @staticmethod
    def _checked(operation: str, shape: Shape, dtype: DataType, device: Device) -> Shape:
        check_device(operation, device)
        return check_shape(operation, shape, dtype)


def _no_memory(operation: str, shape: Shape, dtype: DataType) -> ResourceExhaustedError:
    return ResourceExhaustedError(f"{operation}: shape {shape} of {dtype}, more than this machine has free")
