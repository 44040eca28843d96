"""TorchTensor: a `torch.Tensor` behind the tensor contract.  Clauses: BK-TORCH-4..7 (specs/backend_torch.md)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ferrum_ref.errors import DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorLike
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_torch import conversion
from ferrum_torch.rounding import cast


class TorchTensor(TensorLike):
    """A handle on a torch tensor, outside autograd.  [BK-TORCH-4]

    `data` is that tensor. `is_read_only` marks memory that the caller handed over without the right to write.
    """

    __slots__ = ("data", "is_read_only")

    def __init__(self, data: torch.Tensor, is_read_only: bool = False) -> None:
        self.data = data
        self.is_read_only = is_read_only

    @classmethod
    def wrap(cls, data: torch.Tensor) -> TorchTensor:
        """A handle on someone else's tensor: cut off from autograd, storage shared.  [BK-TORCH-4]

        Raises DeviceError for an element type without a DataType and for a device other than CPU and CUDA.
        """
        if data.dtype not in conversion.DATA_TYPES:
            known = ", ".join(str(known) for known in conversion.TORCH_TYPES)
            raise DeviceError(f"TorchTensor: data: got element type {data.dtype}, expected one of {known}; convert it")
        conversion.device_of(data)
        return cls(data.detach())

    def shape(self) -> Shape:
        return tuple(self.data.shape)

    def dtype(self) -> DataType:
        return conversion.DATA_TYPES[self.data.dtype]

    def device(self) -> Device:
        return conversion.device_of(self.data)

    def is_contiguous(self) -> bool:
        return self.data.is_contiguous()

    def numel(self) -> int:
        return self.data.numel()

    def ndim(self) -> int:
        return self.data.ndim

    def view(self, start: Shape, end: Shape) -> TorchTensor:
        """The box start[i]:end[i], sharing storage. Raises InvalidParameterError outside 0 <= start <= end <= dim."""
        data = self.data
        if len(start) != data.ndim or len(end) != data.ndim:
            raise InvalidParameterError(
                f"view: start {tuple(start)} and end {tuple(end)}, expected one entry for each axis of {self.shape()}"
            )
        for axis, (low, high, dim) in enumerate(zip(start, end, self.data.shape, strict=True)):
            if not 0 <= low <= high <= dim:
                raise InvalidParameterError(
                    f"view: start {tuple(start)} and end {tuple(end)}, expected 0 <= start <= end <= {self.shape()} "
                    "on every axis"
                )
            if high - low != dim:
                data = data.narrow(axis, low, high - low)
        return TorchTensor(data, self.is_read_only)

    def reshape(self, shape: Shape) -> TorchTensor:
        """The same elements in row-major order; shares storage where strides allow. Raises BackendError otherwise."""
        data = self.data
        if math.prod(shape) != data.numel() or any(dim < 0 for dim in shape):
            raise ShapeError(
                f"reshape: shape {tuple(shape)} for a tensor of shape {self.shape()}, expected {data.numel()} elements "
                "and no negative dimension"
            )
        return TorchTensor(data.reshape(shape), self.is_read_only)

    def to_cpu(self) -> TorchTensor:
        return self if self.data.is_cpu else TorchTensor(self.data.cpu())

    def to_device(self, device: Device) -> TorchTensor:
        """The same values on `device`; self if they are there. Raises DeviceError with the reason if there is none."""
        target = conversion.torch_device(device, "to_device")
        return self if self.data.device == target else TorchTensor(self.data.to(target))

    def to_dtype(self, dtype: DataType) -> TorchTensor:
        """The same values rounded to `dtype`; self if they have it.  [BK-TORCH-7]"""
        target = conversion.torch_dtype(dtype, "to_dtype")
        return self if self.data.dtype is target else TorchTensor(cast(self.data, target))

    def to_numpy(self) -> NDArray[Any]:
        """The elements on the host in their own type, bf16 as `ml_dtypes.bfloat16`; a view on the CPU.  [BK-TORCH-5]"""
        array = conversion.to_numpy(self.data)
        if self.is_read_only:
            array = array.view()
            array.flags.writeable = False
        return array

    def to_vec_f32(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> NDArray[np.float32]:
        """All elements, flat in row-major order, as a float32 copy (D-12); UPSTREAM: one row."""
        if parity_mode is ParityMode.UPSTREAM:
            return super().to_vec_f32(parity_mode=parity_mode)
        return np.array(cast(self.data, torch.float32).cpu().numpy(), dtype=np.float32).reshape(-1)

    def __repr__(self) -> str:
        return f"TorchTensor(shape={self.shape()}, dtype={self.dtype()}, device={self.device()})"


def is_read_only(tensor: object) -> bool:
    """True for a tensor on memory that may not be written. Pure."""
    return isinstance(tensor, TorchTensor) and tensor.is_read_only
