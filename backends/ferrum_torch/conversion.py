"""Element types, devices and host arrays: what each of them is called in torch, and how values cross over.

Rounding is to nearest, ties to even, everywhere.  Clauses: BK-TORCH-4..7 (specs/backend_torch.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from ferrum_ref.errors import DeviceError
from ferrum_ref.types.devices import DataType, Device

TORCH_TYPES: Mapping[DataType, torch.dtype] = MappingProxyType(
    {
        DataType.FP32: torch.float32,
        DataType.FP16: torch.float16,
        DataType.BF16: torch.bfloat16,
        DataType.FP8: torch.float8_e4m3fn,
        DataType.INT32: torch.int32,
        DataType.INT16: torch.int16,
        DataType.INT8: torch.int8,
        DataType.UINT32: torch.uint32,
        DataType.UINT16: torch.uint16,
        DataType.UINT8: torch.uint8,
        DataType.BOOL: torch.bool,
    }
)
DATA_TYPES: Mapping[torch.dtype, DataType] = MappingProxyType({theirs: ours for ours, theirs in TORCH_TYPES.items()})

NUMPY_TYPES: Mapping[Any, torch.dtype] = MappingProxyType(
    {
        np.dtype(numpy_type): theirs
        for numpy_type, theirs in (
            (np.float32, torch.float32),
            (np.float16, torch.float16),
            (ml_dtypes.bfloat16, torch.bfloat16),
            (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
            (np.int32, torch.int32),
            (np.int16, torch.int16),
            (np.int8, torch.int8),
            (np.uint32, torch.uint32),
            (np.uint16, torch.uint16),
            (np.uint8, torch.uint8),
            (np.bool_, torch.bool),
        )
    }
)

TO_NUMPY_TYPES: Mapping[torch.dtype, Any] = MappingProxyType({theirs: ours for ours, theirs in NUMPY_TYPES.items()})

# Types that numpy knows only through ml_dtypes cross over as plain integers of the same width.
CARRIERS: Mapping[torch.dtype, tuple[torch.dtype, Any, Any]] = MappingProxyType(
    {
        torch.bfloat16: (torch.uint16, np.dtype(np.uint16), np.dtype(ml_dtypes.bfloat16)),
        torch.float8_e4m3fn: (torch.uint8, np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e4m3fn)),
    }
)


def torch_dtype(dtype: DataType, operation: str) -> torch.dtype:
    """The torch type of `dtype`. Pure. Raises DeviceError for INT4 and UINT4, which torch does not have."""
    try:
        return TORCH_TYPES[dtype]
    except KeyError:
        known = ", ".join(str(known) for known in TORCH_TYPES)
        raise DeviceError(
            f"{operation}: dtype: got {dtype}, expected one of {known}; keep packed 4-bit data as uint8"
        ) from None


def torch_device(device: Device, operation: str) -> torch.device:
    """The torch device of `device`, which exists. Pure. Raises DeviceError with the reason otherwise."""
    if device.kind == "cpu":
        return torch.device("cpu")
    if device.kind != "cuda":
        raise DeviceError(f"{operation}: device: got {device}, expected cpu or cuda:N, all that this backend drives")
    if torch.version.cuda is None:
        raise DeviceError(
            f"{operation}: device: got {device}, but torch {torch.__version__} is built without CUDA; "
            "install a CUDA build of torch (https://pytorch.org/get-started) or use device 'cpu'"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{operation}: device: got {device}, but torch finds no usable NVIDIA GPU or driver; use device 'cpu'"
        )
    count = torch.cuda.device_count()
    if device.ordinal is None or device.ordinal >= count:
        raise DeviceError(f"{operation}: device: got {device}, expected cuda:0 to cuda:{count - 1}; correct the index")
    return torch.device("cuda", device.ordinal)


def device_of(data: torch.Tensor) -> Device:
    """Where `data` lies. Pure. Raises DeviceError for a device that this backend does not drive."""
    if data.device.type == "cpu":
        return Device.CPU
    if data.device.type == "cuda":
        return Device.CUDA(data.device.index or 0)
    raise DeviceError(f"device: got torch device {data.device}, expected cpu or cuda; move the tensor first")


def usable_devices() -> list[Device]:
    """The CPU, then every GPU that torch can use. Pure."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Device.CPU, *(Device.CUDA(index) for index in range(count))]


def to_numpy(data: torch.Tensor) -> NDArray[Any]:
    """The elements on the host, in their own type; a view for CPU tensors, a copy for others. Pure."""
    host = data.detach().cpu()
    if host.dtype not in CARRIERS:
        return np.asarray(host.numpy())
    carrier, _, numpy_type = CARRIERS[host.dtype]
    return np.asarray(host.view(carrier).numpy().view(numpy_type))


def from_numpy(array: NDArray[Any], operation: str) -> torch.Tensor:
    """The array as a CPU tensor of its own element type; shares memory unless torch cannot address the array. Pure.

    Copied: foreign byte order, negative or fractional strides, unaligned data. Raises DeviceError for an element type
    without a DataType.
    """
    native = array.dtype.newbyteorder("=")
    if native not in NUMPY_TYPES:
        raise DeviceError(
            f"{operation}: array: got element type {array.dtype}, expected one of "
            f"{', '.join(str(known) for known in TORCH_TYPES)}; convert it first (there are no 64-bit types)"
        )
    array = np.asarray(array, dtype=native)
    if not array.flags.aligned or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    target = NUMPY_TYPES[native]
    if target in CARRIERS:
        return share(array.view(CARRIERS[target][1])).view(target)
    return share(array)


def share(array: NDArray[Any]) -> torch.Tensor:
    """A tensor on the array's own memory. A read-only array goes through DLPack, which does not warn about it."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    try:
        return from_dlpack(array)
    except BufferError:  # a numpy or torch that does not hand over read-only memory
        return torch.from_numpy(array.copy())
