"""Host access to a tensor's bytes, how its storage is laid out, and how much storage lives.

`TensorDataAccess` and `TensorMemoryManager` are upstream's; `TensorLayout` and `Fp8Format` are extensions.
Clauses: TN-DATA-*, TN-LAYOUT-*, TN-MEMORY-*, TN-FP8-* in specs/tensor.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.tensor_like import Shape, TensorRef
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.record import Record, Usize


class Fp8Format(Enum):
    """Which eight bits DataType.FP8 means (extension, D-07).  [TN-FP8-1]

    E4M3FN, the default: 4 exponent bits, largest 448, no infinities. E5M2: 5 exponent bits, largest 57344, infinities.
    """

    E4M3FN = "e4m3fn"
    E5M2 = "e5m2"


@runtime_checkable
class TensorDataAccess(Protocol):
    """The bytes of a tensor on the host.  [TN-DATA-1..4]"""

    __slots__ = ()

    @abstractmethod
    def data_f32(self) -> NDArray[np.float32] | None:
        """The elements, flat, without a copy and read-only; None unless contiguous FP32 on the CPU.  [TN-DATA-1]"""

    @abstractmethod
    def data_bytes(self) -> memoryview | None:
        """The storage's bytes, without a copy and read-only; None unless contiguous on the CPU.  [TN-DATA-2]"""

    @abstractmethod
    def to_vec_f32(self) -> NDArray[np.float32]:
        """All elements, flat in row-major order, as a float32 copy.  [TN-LIKE-7]"""

    @abstractmethod
    def to_vec_u8(self) -> bytes:
        """A copy of the bytes in row-major order, little-endian; 4-bit elements two to a byte.  [TN-DATA-3]"""


@runtime_checkable
class TensorLayout(Protocol):
    """How a tensor lies in memory, and with whom it shares that memory (extension).  [TN-LAYOUT-1..4]"""

    __slots__ = ()

    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Elements, not bytes, from one index of each axis to the next. Pure."""

    @abstractmethod
    def is_view(self) -> bool:
        """True when another tensor made the storage and this one shows it without a copy. Pure."""

    @abstractmethod
    def shares_memory_with(self, other: TensorRef) -> bool:
        """True when some element of both is the same piece of memory. Pure."""

    @abstractmethod
    def contiguous(self) -> TensorRef:
        """The same values in row-major order without gaps: the tensor itself if it is so, else a new one."""


@dataclass(frozen=True, slots=True)
class TensorMemoryStats(Record):
    """Counters of a tensor memory manager, in bytes and tensors.  [TN-MEMORY-1]"""

    total_allocated: Usize
    used_memory: Usize
    active_tensors: Usize
    peak_memory: Usize


class TensorMemoryManager(ABC):
    """Storage that is counted, reused and given back.  [TN-MEMORY-1..6]"""

    @abstractmethod
    def preallocate(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """A tensor of zeros whose storage comes back to the manager when nobody refers to it.  [TN-MEMORY-3]

        Raises BackendError for a negative dim; DeviceError for another device; ResourceExhaustedError without memory.
        """

    @abstractmethod
    def clear(self, tensor: TensorRef) -> None:
        """Set every element to zero in place; the storage stays. Mutates the tensor and all that share its memory.

        Raises BackendError for memory that may not be written, or another backend's tensor.  [TN-MEMORY-5]
        """

    @abstractmethod
    def memory_stats(self) -> TensorMemoryStats:
        """The counters at this moment. Pure.  [TN-MEMORY-1]"""

    @abstractmethod
    def gc(self) -> None:
        """Give back the storage that is kept for reuse and that no tensor shows.  [TN-MEMORY-4]"""
