"""NumbaTensorFactory: makes tensors on the CPU.  Clauses: BK-NCPU-6 (specs/backend_numba.md), TN-FACTORY-*."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu import conversion
from ferrum_numba.cpu.integers import as_integers
from ferrum_numba.cpu.runtime import Runtime
from ferrum_numba.cpu.tensor import NumbaTensor, check_device
from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ResourceExhaustedError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorFactory, TensorRef
from ferrum_ref.types.devices import DataType, Device


class NumbaTensorFactory(TensorFactory):
    """Random tensors come from numpy's generator, so a seed gives the same values as on other backends."""

    def __init__(self, runtime: Runtime, seed: int = 0) -> None:
        self._runtime = runtime
        self._rng = np.random.default_rng(seed)

    def empty(self, shape: Shape, dtype: DataType, device: Device) -> NumbaTensor:
        return self._filled("empty", 0, shape, dtype, device)

    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> NumbaTensor:
        return self._filled("zeros", 0, shape, dtype, device)

    def ones(self, shape: Shape, dtype: DataType, device: Device) -> NumbaTensor:
        return self._filled("ones", 1, shape, dtype, device)

    def zeros_like(self, tensor: TensorRef) -> NumbaTensor:
        data = self._runtime.take("zeros_like", "tensor", tensor)
        return NumbaTensor(np.zeros(data.shape, data.dtype))

    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> NumbaTensor:
        """Flat row-major float32 values, copied and cast. Raises BackendError unless len(data) == prod(shape)."""
        values = np.array(data, dtype=np.float32)
        if values.ndim != 1 or values.size != _num_elements("from_slice", shape):
            raise ShapeError(
                f"from_slice: {values.size} values of shape {values.shape} for shape {tuple(shape)}, "
                f"expected {math.prod(shape)} in one row"
            )
        return self._placed("from_slice", values.reshape(shape), dtype, device)

    def to_device(self, tensor: TensorRef, device: Device) -> TensorRef:
        self._runtime.take("to_device", "tensor", tensor)
        return tensor.to_device(device)

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> NumbaTensor:
        """`length` entries of axis `dim` from `start`, sharing storage. Raises BackendError when out of range."""
        data = self._runtime.take("narrow", "tensor", tensor)
        if not 0 <= dim < data.ndim or start < 0 or length < 0 or start + length > data.shape[dim]:
            raise ShapeError(
                f"narrow: dim={dim}, start={start}, length={length} of shape {data.shape}, "
                "expected an existing axis and a range inside it"
            )
        return NumbaTensor(data[(slice(None),) * dim + (slice(start, start + length),)])

    def reshape(self, tensor: TensorRef, shape: Shape) -> TensorRef:
        self._runtime.take("reshape", "tensor", tensor)
        return tensor.reshape(shape)

    def uniform(
        self,
        shape: Shape,
        low: float,
        high: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> NumbaTensor:
        """Independent draws from U[low, high), rounded once. Raises BackendError unless finite and low <= high."""
        _num_elements("uniform", shape)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise BackendError(f"uniform: low={low}, high={high}; expected finite numbers with low <= high")
        return self._placed("uniform", np.asarray((rng or self._rng).uniform(low, high, shape)), dtype, device)

    def normal(
        self,
        shape: Shape,
        mean: float,
        std: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> NumbaTensor:
        """Independent draws from N(mean, std), rounded once. Raises BackendError if std < 0."""
        _num_elements("normal", shape)
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
            raise BackendError(f"normal: mean={mean}, std={std}; expected finite numbers with std >= 0")
        return self._placed("normal", np.asarray((rng or self._rng).normal(mean, std, shape)), dtype, device)

    def from_tensor(self, tensor: TensorRef, device: Device) -> NumbaTensor:
        """A contiguous copy; a tensor of another backend comes over through the host."""
        check_device(device, "from_tensor")
        return NumbaTensor(np.array(self.from_numpy(tensor.to_numpy()).data, order="C", copy=True))

    def from_numpy(self, array: Array, device: Device | None = None) -> NumbaTensor:
        """The array as a tensor of its own element type, sharing its memory.  [BK-NCPU-6]

        Copied: foreign byte order, unaligned data. Raises DeviceError for an element type without a DataType.
        """
        check_device(device or Device.CPU, "from_numpy")
        array = np.asarray(array)
        native = array.dtype.newbyteorder("=")
        if native not in conversion.DATA_TYPES:
            known = ", ".join(str(known) for known in conversion.NUMPY_TYPES)
            raise DeviceError(
                f"from_numpy: array: got element type {array.dtype}, expected one of {known}; "
                "convert it first (there are no 64-bit types)"
            )
        if array.dtype != native or not array.flags.aligned:
            array = np.array(array, dtype=native)
        return NumbaTensor(array)

    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> NumbaTensor:
        """Token ids as a UINT32 tensor (T,), exact beyond 2**24 (D-13)."""
        check_device(device or Device.CPU, "from_ids")
        if np.ndim(ids) != 1:
            raise InvalidParameterError(f"from_ids: ids: got shape {np.shape(ids)}, expected a flat list of integers")
        values = as_integers("from_ids", "ids", ids)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
            bad = values[(values < 0) | (values >= 2**32)]
            raise InvalidParameterError(f"from_ids: ids: got {int(bad[0])}, expected integers in [0, 2**32)")
        return NumbaTensor(values.astype(np.uint32))

    def _filled(self, operation: str, value: int, shape: Shape, dtype: DataType, device: Device) -> NumbaTensor:
        num_elements = _num_elements(operation, shape)
        element_type = conversion.numpy_type(dtype, operation)
        check_device(device, operation)
        try:
            data = np.zeros(tuple(shape), element_type) if value == 0 else np.ones(tuple(shape), element_type)
        except (MemoryError, ValueError) as error:
            raise ResourceExhaustedError(
                f"{operation}: shape: got {tuple(shape)} of {dtype}, {num_elements * element_type.itemsize} bytes, "
                "expected no more than this machine has free"
            ) from error
        return NumbaTensor(data)

    @staticmethod
    def _placed(operation: str, values: Array, dtype: DataType, device: Device) -> NumbaTensor:
        element_type = conversion.numpy_type(dtype, operation)
        check_device(device, operation)
        return NumbaTensor(conversion.cast(values, element_type))


def _num_elements(operation: str, shape: Shape) -> int:
    if any(dim < 0 for dim in shape):
        raise ShapeError(f"{operation}: shape: got {tuple(shape)}, expected dimensions of at least 0")
    return math.prod(shape)
