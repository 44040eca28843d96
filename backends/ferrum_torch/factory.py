"""TorchTensorFactory: makes tensors on the CPU or a GPU.  Clauses: BK-TORCH-5..6 (specs/backend_torch.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorFactory, TensorRef
from ferrum_ref.types.devices import DataType, Device
from ferrum_torch import conversion
from ferrum_torch.integers import as_integers
from ferrum_torch.rounding import cast
from ferrum_torch.runtime import Runtime
from ferrum_torch.tensor import TorchTensor, is_read_only


class TorchTensorFactory(TensorFactory):
    """Random tensors come from numpy's generator, so a seed gives the same values on every device.  [BK-TORCH-6]"""

    def __init__(self, runtime: Runtime, seed: int = 0) -> None:
        self._runtime = runtime
        self._rng = np.random.default_rng(seed)

    def empty(self, shape: Shape, dtype: DataType, device: Device) -> TorchTensor:
        return self._filled("empty", 0, shape, dtype, device)

    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> TorchTensor:
        return self._filled("zeros", 0, shape, dtype, device)

    def ones(self, shape: Shape, dtype: DataType, device: Device) -> TorchTensor:
        return self._filled("ones", 1, shape, dtype, device)

    def zeros_like(self, tensor: TensorRef) -> TorchTensor:
        data = self._runtime.take("zeros_like", "tensor", tensor)
        return TorchTensor(torch.zeros(data.shape, dtype=data.dtype, device=data.device))

    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> TorchTensor:
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

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> TorchTensor:
        """`length` entries of axis `dim` from `start`, sharing storage. Raises BackendError when out of range."""
        data = self._runtime.take("narrow", "tensor", tensor)
        if not 0 <= dim < data.ndim or start < 0 or length < 0 or start + length > data.shape[dim]:
            raise ShapeError(
                f"narrow: dim={dim}, start={start}, length={length} of shape {tuple(data.shape)}, "
                "expected an existing axis and a range inside it"
            )
        return TorchTensor(data.narrow(dim, start, length), is_read_only(tensor))

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
    ) -> TorchTensor:
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
    ) -> TorchTensor:
        """Independent draws from N(mean, std), rounded once. Raises BackendError if std < 0."""
        _num_elements("normal", shape)
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
            raise BackendError(f"normal: mean={mean}, std={std}; expected finite numbers with std >= 0")
        return self._placed("normal", np.asarray((rng or self._rng).normal(mean, std, shape)), dtype, device)

    def from_tensor(self, tensor: TensorRef, device: Device) -> TorchTensor:
        """A copy on `device`; a tensor of another backend comes over through the host."""
        target = conversion.torch_device(device, "from_tensor")
        if isinstance(tensor, TorchTensor):
            return TorchTensor(tensor.data.to(target, copy=True))
        return TorchTensor(conversion.from_numpy(tensor.to_numpy(), "from_tensor").to(target, copy=True))

    def from_numpy(self, array: Array, device: Device | None = None) -> TorchTensor:
        """The array as a tensor of its own element type; on the CPU it shares the array's memory.  [BK-TORCH-5]"""
        target = conversion.torch_device(device or self._runtime.device, "from_numpy")
        array = np.asarray(array)
        data = conversion.from_numpy(array, "from_numpy")
        if target.type != "cpu":
            return TorchTensor(data.to(target))
        return TorchTensor(data, is_read_only=not array.flags.writeable)

    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> TorchTensor:
        """Token ids as a UINT32 tensor (T,), exact beyond 2**24 (D-13).  [BK-TORCH-5]"""
        target = conversion.torch_device(device or self._runtime.device, "from_ids")
        if np.ndim(ids) != 1:
            raise InvalidParameterError(f"from_ids: ids: got shape {np.shape(ids)}, expected a flat list of integers")
        values = as_integers("from_ids", "ids", ids)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
            bad = values[(values < 0) | (values >= 2**32)]
            raise InvalidParameterError(f"from_ids: ids: got {int(bad[0])}, expected integers in [0, 2**32)")
        return TorchTensor(torch.from_numpy(values.astype(np.uint32)).to(target))

    def _filled(self, operation: str, value: int, shape: Shape, dtype: DataType, device: Device) -> TorchTensor:
        _num_elements(operation, shape)
        element_type = conversion.torch_dtype(dtype, operation)
        target = conversion.torch_device(device, operation)
        if value == 0:
            return TorchTensor(torch.zeros(tuple(shape), dtype=element_type, device=target))
        return TorchTensor(torch.ones(tuple(shape), dtype=torch.uint8, device=target).to(element_type))

    @staticmethod
    def _placed(operation: str, values: Array, dtype: DataType, device: Device) -> TorchTensor:
        element_type = conversion.torch_dtype(dtype, operation)
        target = conversion.torch_device(device, operation)
        return TorchTensor(cast(torch.from_numpy(values).to(target), element_type))


def _num_elements(operation: str, shape: Shape) -> int:
    if any(dim < 0 for dim in shape):
        raise ShapeError(f"{operation}: shape: got {tuple(shape)}, expected dimensions of at least 0")
    return math.prod(shape)
