"""CupyTensorFactory: makes tensors on the backend's device.  Clauses: BK-CUPY-5, TN-FACTORY-*."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_cupy.runtime import Runtime, as_integers
from ferrum_cupy.storage import ARRAY_TYPES, DATA_TYPES, FLOATS, array_type, narrow
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorFactory, TensorRef
from ferrum_ref.types.devices import DataType, Device


class CupyTensorFactory(TensorFactory):
    """Random tensors come from numpy's generator, so a seed gives the same values on every device."""

    def __init__(self, runtime: Runtime, seed: int = 0) -> None:
        self._runtime, self._machine = runtime, runtime.machine
        self._rng = np.random.default_rng(seed)

    def empty(self, shape: Shape, dtype: DataType, device: Device) -> CupyTensor:
        return self._filled("empty", 0, shape, dtype, device)

    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> CupyTensor:
        return self._filled("zeros", 0, shape, dtype, device)

    def ones(self, shape: Shape, dtype: DataType, device: Device) -> CupyTensor:
        return self._filled("ones", 1, shape, dtype, device)

    def zeros_like(self, tensor: TensorRef) -> CupyTensor:
        like = self._runtime.take("zeros_like", "tensor", tensor)
        return CupyTensor(self._machine, self._machine.xp.zeros(like.array.shape, like.array.dtype), like.kind)

    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> CupyTensor:
        """Flat row-major float32 values, copied and cast. Raises BackendError unless len(data) == prod(shape)."""
        values = np.array(data, dtype=np.float32)
        if values.ndim != 1 or values.size != _num_elements("from_slice", shape):
            raise ShapeError(
                f"from_slice: {values.size} values of shape {values.shape} for shape {tuple(shape)}, "
                f"expected {math.prod(shape)} in one row"
            )
        return self._placed("from_slice", values.reshape(shape), dtype, device)

    def to_device(self, tensor: TensorRef, device: Device) -> CupyTensor:
        return self._runtime.take("to_device", "tensor", tensor).to_device(device)

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> CupyTensor:
        """`length` entries of axis `dim` from `start`, sharing storage. Raises BackendError when out of range."""
        whole = self._runtime.take("narrow", "tensor", tensor)
        shape = whole.shape()
        if not 0 <= dim < len(shape) or start < 0 or length < 0 or start + length > shape[dim]:
            raise ShapeError(
                f"narrow: dim={dim}, start={start}, length={length} of shape {shape}, "
                "expected an existing axis and a range inside it"
            )
        low, high = [0] * len(shape), list(shape)
        low[dim], high[dim] = start, start + length
        return whole.view(tuple(low), tuple(high))

    def reshape(self, tensor: TensorRef, shape: Shape) -> CupyTensor:
        return self._runtime.take("reshape", "tensor", tensor).reshape(shape)

    def uniform(
        self,
        shape: Shape,
        low: float,
        high: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> CupyTensor:
        """Independent draws from U[low, high), rounded once. Raises BackendError unless finite and low <= high."""
        _num_elements("uniform", shape)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise BackendError(f"uniform: low={low}, high={high}; expected finite numbers with low <= high")
        return self._drawn("uniform", np.asarray((rng or self._rng).uniform(low, high, shape)), dtype, device)

    def normal(
        self,
        shape: Shape,
        mean: float,
        std: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> CupyTensor:
        """Independent draws from N(mean, std), rounded once. Raises BackendError if std < 0."""
        _num_elements("normal", shape)
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
            raise BackendError(f"normal: mean={mean}, std={std}; expected finite numbers with std >= 0")
        return self._drawn("normal", np.asarray((rng or self._rng).normal(mean, std, shape)), dtype, device)

    def from_tensor(self, tensor: TensorRef, device: Device) -> CupyTensor:
        """A copy on `device`; a tensor of another backend comes over through the host."""
        self._check_device("from_tensor", device)
        if isinstance(tensor, CupyTensor) and tensor.machine is self._machine:
            return CupyTensor(self._machine, tensor.array.copy(), tensor.kind)
        return self.from_numpy(np.array(tensor.to_numpy()), device)

    def from_numpy(self, array: Array, device: Device | None = None) -> CupyTensor:
        """The array as a tensor of its own element type. Raises DeviceError for one without a DataType.  [BK-CUPY-5]"""
        self._check_device("from_numpy", device or self._machine.device)
        array = np.asarray(array)
        native = array.dtype.newbyteorder("=")
        if native not in DATA_TYPES:
            known = ", ".join(known.name for known in ARRAY_TYPES)
            raise DeviceError(
                f"from_numpy: array: got element type {array.dtype}, expected one of {known}; convert it first"
            )
        kind = DATA_TYPES[native]
        given = np.asarray(array, dtype=native)
        stored = given.view(ARRAY_TYPES[kind])
        return CupyTensor(self._machine, self._machine.xp.asarray(stored), kind, not given.flags.writeable)

    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> CupyTensor:
        """Token ids as a UINT32 tensor (T,), exact beyond 2**24 (D-13)."""
        self._check_device("from_ids", device or self._machine.device)
        if np.ndim(ids) != 1:
            raise InvalidParameterError(f"from_ids: ids: got shape {np.shape(ids)}, expected a flat list of integers")
        values = as_integers("from_ids", "ids", ids)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
            bad = values[(values < 0) | (values >= 2**32)]
            raise InvalidParameterError(f"from_ids: ids: got {int(bad[0])}, expected integers in [0, 2**32)")
        return CupyTensor(self._machine, self._machine.xp.asarray(values.astype(np.uint32)), DataType.UINT32)

    def _filled(self, operation: str, value: int, shape: Shape, dtype: DataType, device: Device) -> CupyTensor:
        _num_elements(operation, shape)
        kind = array_type(dtype, operation)
        self._check_device(operation, device)
        xp = self._machine.xp
        bits = {DataType.BF16: 0x3F80, DataType.FP8: 0x38}.get(dtype, value) if value else 0
        return CupyTensor(
            self._machine, xp.full(tuple(shape), bits, kind) if bits else xp.zeros(tuple(shape), kind), dtype
        )

    def _placed(self, operation: str, values: Array, dtype: DataType, device: Device) -> CupyTensor:
        array_type(dtype, operation)
        self._check_device(operation, device)
        return CupyTensor(self._machine, self._machine.xp.asarray(values), DataType.FP32).to_dtype(dtype)

    def _drawn(self, operation: str, values: Array, dtype: DataType, device: Device) -> CupyTensor:
        """float64 draws, rounded once to a float type, or by way of float32 to another."""
        array_type(dtype, operation)
        self._check_device(operation, device)
        if dtype in FLOATS:  # on the host: a GPU may take subnormal numbers for zero
            with np.errstate(over="ignore", under="ignore"):
                return CupyTensor(self._machine, self._machine.xp.asarray(narrow(np, values, dtype)), dtype)
        return self._placed(operation, values.astype(np.float32), dtype, device)

    def _check_device(self, operation: str, device: Device) -> None:
        if device != self._machine.device:
            raise DeviceError(
                f"{operation}: device: got {device}, expected {self._machine.device}; this backend has no other"
            )


def _num_elements(operation: str, shape: Shape) -> int:
    if any(dim < 0 for dim in shape):
        raise ShapeError(f"{operation}: shape: got {tuple(shape)}, expected dimensions of at least 0")
    return math.prod(shape)
