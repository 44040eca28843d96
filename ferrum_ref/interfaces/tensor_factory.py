"""Making tensors.   Clauses: TN-FACTORY-* in specs/tensor.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.tensor_like import Array, Shape, TensorRef
from ferrum_ref.types.devices import DataType, Device


class TensorFactory(ABC):
    """Makes tensors.  [TN-FACTORY-1..8]"""

    @abstractmethod
    def empty(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """A tensor to be filled later; the reference fills it with zeros, so results repeat."""

    @abstractmethod
    def zeros_like(self, tensor: TensorRef) -> TensorRef:
        """Zeros of the argument's shape, dtype and device."""

    @abstractmethod
    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        """Flat row-major float32 values, cast to `dtype`. Raises BackendError unless `len(data) == prod(shape)`."""

    @abstractmethod
    def to_device(self, tensor: TensorRef, device: Device) -> TensorRef:
        """As `TensorLike.to_device`."""

    @abstractmethod
    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> TensorRef:
        """`length` entries of axis `dim` from `start`, sharing storage. Raises BackendError when out of range."""

    @abstractmethod
    def reshape(self, tensor: TensorRef, shape: Shape) -> TensorRef:
        """As `TensorLike.reshape`."""

    @abstractmethod
    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """Filled with zero."""

    @abstractmethod
    def ones(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """Filled with one."""

    @abstractmethod
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
        """Independent draws from U[low, high), then cast. `rng` (extension) or the factory's own seeded generator."""

    @abstractmethod
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
        """Independent draws from N(mean, std), then cast; `rng` as in `uniform`. Raises BackendError if std < 0."""

    @abstractmethod
    def from_tensor(self, tensor: TensorRef, device: Device) -> TensorRef:
        """A copy of `tensor` on `device`."""

    @abstractmethod
    def from_numpy(self, array: Array, device: Device | None = None) -> TensorRef:
        """The array as a tensor of its own element type, without a copy where possible (extension).  [TN-FACTORY-7]

        `device=None` means the factory's device. Raises DeviceError for an element type without a DataType
        (64-bit types among them).
        """

    @abstractmethod
    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> TensorRef:
        """Token ids as a UINT32 tensor `[T]`, exact beyond 2**24 (extension, D-13).  [TN-FACTORY-4]

        Raises InvalidParameterError for anything but integers in [0, 2**32).
        """
