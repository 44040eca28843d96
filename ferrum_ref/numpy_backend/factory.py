"""Makes NumpyTensors.   Clauses: TN-FACTORY-1..6."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorFactory, TensorRef
from ferrum_ref.kernels.rounding import cast
from ferrum_ref.numpy_backend.dtypes import ELEMENT_TYPES, data_type
from ferrum_ref.numpy_backend.tensor import NumpyTensor, array_of, check_device
from ferrum_ref.types.devices import DataType, Device


class NumpyTensorFactory(TensorFactory):
    """Makes tensors on the CPU. Owns the generator that `uniform` and `normal` use when the call brings none."""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self._rng = rng if rng is not None else np.random.default_rng(0)

    def empty(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return self.zeros(shape, dtype, device)

    def zeros_like(self, tensor: TensorRef) -> TensorRef:
        return NumpyTensor(np.zeros_like(array_of("zeros_like", tensor)))

    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        _check("from_slice", shape, device)
        values = np.array(data, dtype=np.float32)
        if values.ndim != 1 or values.size != math.prod(shape):
            raise ShapeError(
                f"from_slice: data of shape {values.shape} for shape {tuple(shape)}, "
                f"expected {math.prod(shape)} flat values"
            )
        return NumpyTensor(cast(values.reshape(shape), ELEMENT_TYPES[dtype]))

    def to_device(self, tensor: TensorRef, device: Device) -> TensorRef:
        return tensor.to_device(device)

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> TensorRef:
        array = array_of("narrow", tensor)
        if not 0 <= dim < array.ndim:
            raise ShapeError(f"narrow: axis {dim} of shape {array.shape}, expected 0 <= axis < {array.ndim}")
        if start < 0 or length < 0 or start + length > array.shape[dim]:
            raise ShapeError(
                f"narrow: start {start}, length {length} on axis {dim} of shape {array.shape}, "
                f"expected start + length <= {array.shape[dim]}"
            )
        return NumpyTensor(array[(slice(None),) * dim + (slice(start, start + length),)])

    def reshape(self, tensor: TensorRef, shape: Shape) -> TensorRef:
        return tensor.reshape(shape)

    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        _check("zeros", shape, device)
        return NumpyTensor(np.zeros(shape, ELEMENT_TYPES[dtype]))

    def ones(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        _check("ones", shape, device)
        return NumpyTensor(np.ones(shape, ELEMENT_TYPES[dtype]))

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
        _check("uniform", shape, device)
        if not -math.inf < low <= high < math.inf:
            raise BackendError(f"uniform: low {low}, high {high}, expected finite low <= high")
        draws = (rng if rng is not None else self._rng).uniform(low, high, shape)
        return NumpyTensor(cast(np.asarray(draws), ELEMENT_TYPES[dtype]))

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
        _check("normal", shape, device)
        if not 0 <= std < math.inf or not math.isfinite(mean):
            raise BackendError(f"normal: mean {mean}, std {std}, expected finite numbers and std >= 0")
        draws = (rng if rng is not None else self._rng).normal(mean, std, shape)
        return NumpyTensor(cast(np.asarray(draws), ELEMENT_TYPES[dtype]))

    def from_tensor(self, tensor: TensorRef, device: Device) -> TensorRef:
        check_device("from_tensor", device)
        return NumpyTensor(array_of("from_tensor", tensor).copy())

    def from_numpy(self, array: Array, device: Device | None = None) -> TensorRef:
        check_device("from_numpy", device)
        array = np.asarray(array)
        data_type(array.dtype)
        return NumpyTensor(array)

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
        return NumpyTensor(values.astype(np.uint32))


def _check(operation: str, shape: Shape, device: Device) -> None:
    check_device(operation, device)
    if any(dim < 0 for dim in shape):
        raise ShapeError(f"{operation}: shape {tuple(shape)}, expected dims of 0 or more")
