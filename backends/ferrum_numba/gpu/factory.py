"""NumbaTensorFactory: makes tensors on the backend's device.   Clauses: BK-NCUDA-4 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.gpu.casting import cast_host
from ferrum_numba.gpu.integers import as_integers
from ferrum_numba.gpu.kernels.copy import fill
from ferrum_numba.gpu.operands import take
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.storage import BITS, HOST_TYPES, carrier, host_type
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorFactory, TensorRef
from ferrum_ref.types.devices import DataType, Device


class NumbaTensorFactory(TensorFactory):
    """Random tensors come from numpy's generator, so a seed gives the same values as every other backend's."""

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
        data = take(self._runtime, "zeros_like", "tensor", tensor)
        return self._filled("zeros_like", 0, data.shape(), data.dtype(), data.device())

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
        return take(self._runtime, "to_device", "tensor", tensor).to_device(device)

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> NumbaTensor:
        """`length` entries of axis `dim` from `start`, sharing storage. Raises BackendError when out of range."""
        data = take(self._runtime, "narrow", "tensor", tensor)
        if not 0 <= dim < data.ndim() or start < 0 or length < 0 or start + length > data.shape()[dim]:
            raise ShapeError(
                f"narrow: dim={dim}, start={start}, length={length} of shape {data.shape()}, "
                "expected an existing axis and a range inside it"
            )
        low, high = [0] * data.ndim(), list(data.shape())
        low[dim], high[dim] = start, start + length
        return data.view(tuple(low), tuple(high))

    def reshape(self, tensor: TensorRef, shape: Shape) -> NumbaTensor:
        return take(self._runtime, "reshape", "tensor", tensor).reshape(shape)

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
        """A copy; a tensor of another backend comes over through the host."""
        self._check_device("from_tensor", device)
        return NumbaTensor.of_host(self._runtime, tensor.to_numpy(), "from_tensor")

    def from_numpy(self, array: Array, device: Device | None = None) -> NumbaTensor:
        """A copy of the array on the device, in its own element type.  [BK-NCUDA-4]"""
        self._check_device("from_numpy", device)
        return NumbaTensor.of_host(self._runtime, np.asarray(array), "from_numpy")

    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> NumbaTensor:
        """Token ids as a UINT32 tensor (T,), exact beyond 2**24 (D-13)."""
        self._check_device("from_ids", device)
        if np.ndim(ids) != 1:
            raise InvalidParameterError(f"from_ids: ids: got shape {np.shape(ids)}, expected a flat list of integers")
        values = as_integers("from_ids", "ids", ids)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
            bad = values[(values < 0) | (values >= 2**32)]
            raise InvalidParameterError(f"from_ids: ids: got {int(bad[0])}, expected integers in [0, 2**32)")
        return NumbaTensor.of_host(self._runtime, values.astype(np.uint32), "from_ids")

    def _filled(self, operation: str, value: int, shape: Shape, dtype: DataType, device: Device) -> NumbaTensor:
        count = _num_elements(operation, shape)
        host_type(dtype, operation)
        self._check_device(operation, device)
        result = NumbaTensor.empty(self._runtime, tuple(shape), dtype)
        bits = BITS[carrier(dtype).itemsize]
        pattern = int(np.array([value]).astype(HOST_TYPES[dtype]).view(bits)[0])
        self._runtime.launch_each(fill, (bits,), count, result.array.view(bits), pattern, count)
        return result

    def _placed(self, operation: str, values: NDArray[Any], dtype: DataType, device: Device) -> NumbaTensor:
        host_type(dtype, operation)
        self._check_device(operation, device)
        return NumbaTensor.of_host(self._runtime, cast_host(np.asarray(values), dtype), operation)

    def _check_device(self, operation: str, device: Device | None) -> None:
        own = self._runtime.machine.device
        if device is not None and device != own:
            raise DeviceError(
                f"{operation}: device: got {device}, expected {own}, the device of this backend; make a backend there"
            )


def _num_elements(operation: str, shape: Shape) -> int:
    if any(dim < 0 for dim in shape):
        raise ShapeError(f"{operation}: shape: got {tuple(shape)}, expected dimensions of at least 0")
    return math.prod(shape)
