"""Element types: how they lie in device arrays, and how kernels read and write floats of each.

Kernels compute in float32. fp16 and bf16 are widened when read, which is exact, and rounded once when written, to
nearest, ties to even. bf16 lies in uint16 arrays, since numba has no arithmetic of that type everywhere.
Clauses: BK-NCUDA-4, BK-NCUDA-7 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from ferrum_numba.gpu.kernel import device, libdevice
from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.types.devices import DataType


@device
def load_float32(array: Any, index: int) -> Any:
    return array[index]


@device
def store_float32(array: Any, index: int, value: Any) -> None:
    array[index] = value


@device
def load_float16(array: Any, index: int) -> Any:
    return np.float32(array[index])


@device
def store_float16(array: Any, index: int, value: Any) -> None:
    array[index] = np.float16(value)


@device
def load_bfloat16(array: Any, index: int) -> Any:
    return libdevice.int_as_float(np.int32(array[index]) << 16)


@device
def store_bfloat16(array: Any, index: int, value: Any) -> None:
    bits = libdevice.float_as_int(value)
    if value != value:
        array[index] = np.uint16(0x7FFF)  # the NaN that a GPU's own conversion gives
    else:
        array[index] = np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)


@dataclass(frozen=True, slots=True)
class Storage:
    """A float type that kernels take: `load(array, index)` gives float32, `store(array, index, value)` rounds."""

    data_type: DataType
    element: np.dtype[Any]
    load: Callable[..., Any]
    store: Callable[..., None]

    @property
    def array(self) -> str:
        """numba's name of a flat array of it."""
        return f"{self.element.name}[::1]"


FP32 = Storage(DataType.FP32, np.dtype(np.float32), load_float32, store_float32)
FP16 = Storage(DataType.FP16, np.dtype(np.float16), load_float16, store_float16)
BF16 = Storage(DataType.BF16, np.dtype(np.uint16), load_bfloat16, store_bfloat16)
STORAGES: Mapping[DataType, Storage] = MappingProxyType({one.data_type: one for one in (FP32, FP16, BF16)})

HOST_TYPES: Mapping[DataType, np.dtype[Any]] = MappingProxyType(
    {
        DataType.FP32: np.dtype(np.float32),
        DataType.FP16: np.dtype(np.float16),
        DataType.BF16: np.dtype(ml_dtypes.bfloat16),
        DataType.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
        DataType.INT32: np.dtype(np.int32),
        DataType.INT16: np.dtype(np.int16),
        DataType.INT8: np.dtype(np.int8),
        DataType.UINT32: np.dtype(np.uint32),
        DataType.UINT16: np.dtype(np.uint16),
        DataType.UINT8: np.dtype(np.uint8),
        DataType.BOOL: np.dtype(np.bool_),
    }
)
DATA_TYPES: Mapping[np.dtype[Any], DataType] = MappingProxyType({host: data for data, host in HOST_TYPES.items()})
CARRIERS: Mapping[np.dtype[Any], np.dtype[Any]] = MappingProxyType(
    {
        np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
        np.dtype(ml_dtypes.float8_e4m3fn): np.dtype(np.uint8),
        np.dtype(np.bool_): np.dtype(np.uint8),
    }
)
BITS: Mapping[int, np.dtype[Any]] = MappingProxyType({size: np.dtype(f"u{size}") for size in (1, 2, 4)})


def host_type(data_type: DataType, operation: str) -> np.dtype[Any]:
    """The numpy type of `data_type`. Pure. Raises DeviceError for a type that this backend does not hold."""
    if data_type not in HOST_TYPES:
        raise DeviceError(
            f"{operation}: dtype: got {data_type}, expected one of {', '.join(str(known) for known in HOST_TYPES)}; "
            "keep packed data as uint8"
        )
    return HOST_TYPES[data_type]


def data_type_of(element: np.dtype[Any], operation: str) -> DataType:
    """The DataType of a numpy type. Pure. Raises DeviceError if it has none here, 64-bit types among them."""
    found = DATA_TYPES.get(element.newbyteorder("="))
    if found is None:
        raise DeviceError(
            f"{operation}: array: got element type {element}, expected one of "
            f"{', '.join(str(known) for known in HOST_TYPES)}; convert it first"
        )
    return found


def carrier(data_type: DataType) -> np.dtype[Any]:
    """The element type of the device arrays that hold `data_type`. Pure."""
    host = HOST_TYPES[data_type]
    return CARRIERS.get(host, host)


def storage_of(data_type: DataType, operation: str) -> Storage:
    """How kernels read `data_type`. Pure. Raises BackendError unless it is a float type of this backend."""
    if data_type not in STORAGES:
        raise BackendError(f"{operation}: element type {data_type}, expected fp32, fp16 or bf16; convert with to_dtype")
    return STORAGES[data_type]


def common_type(operation: str, a: DataType, b: DataType) -> DataType:
    """The type of a result of two float operands: theirs if equal, else fp32 (TN-DTYPE-2). Pure.

    Raises BackendError for operands that are no floats.
    """
    storage_of(a, operation)
    storage_of(b, operation)
    return a if a is b else DataType.FP32
