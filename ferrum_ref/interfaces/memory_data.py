"""Plain data of the memory contract: handles, transfers, settings, statistics, and the pressure level they imply.

Upstream: `ferrum_interfaces::memory`; re-exported by `memory.py` beside this file.
Clauses: ME-HANDLE-1..2, ME-TRANSFER-1, ME-INFO-1, ME-PRESSURE-1..3, ME-CONFIG-1 (specs/memory.md).
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

import numpy as np

from ferrum_ref.interfaces.kv_cache_data import MemoryPressureThresholds, pressure_from_fraction
from ferrum_ref.types.devices import Device
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import F32, U64, Record, Usize


class MemoryType(enum.Enum):
    """What an allocation is for."""

    General = "General"
    Tensor = "Tensor"
    Cache = "Cache"
    Temporary = "Temporary"
    Pinned = "Pinned"
    Mapped = "Mapped"


class MemoryPressure(enum.IntEnum):
    """How full device memory is; not the KV cache's enum of the same name (D-30, D-38)."""

    Low = 0
    Medium = 1
    High = 2
    Critical = 3


class MemoryAccess(enum.Enum):
    """What a host mapping is for."""

    ReadOnly = "ReadOnly"
    WriteOnly = "WriteOnly"
    ReadWrite = "ReadWrite"


class MemoryUsageHint(enum.Enum):
    """How an allocation will be used."""

    Sequential = "Sequential"
    Random = "Random"
    ReadMostly = "ReadMostly"
    WriteMostly = "WriteMostly"
    Temporary = "Temporary"
    Resident = "Resident"


class AccessPatternType(enum.Enum):
    """How an allocation has been used."""

    Sequential = "Sequential"
    Random = "Random"
    Burst = "Burst"
    Mixed = "Mixed"
    Unknown = "Unknown"


@dataclass(frozen=True, slots=True)
class MemoryHandle(Record):
    """Opaque id of an allocation; 0 is the null handle.  [ME-HANDLE-1]"""

    value: U64

    @classmethod
    def new(cls, id: int) -> Self:
        return cls(id)

    def id(self) -> int:
        return self.value

    def is_valid(self) -> bool:
        """id != 0; does not ask whether the allocation is alive. Pure.  [ME-HANDLE-1]"""
        return self.value != 0


@dataclass(frozen=True, slots=True)
class StreamHandle(Record):
    """Opaque id of a queue; 0 is the default, synchronous stream.  [ME-HANDLE-2]"""

    value: U64

    @classmethod
    def new(cls, id: int) -> Self:
        return cls(id)

    @classmethod
    def default(cls) -> Self:
        """Handle 0."""
        return cls(0)

    @classmethod
    def default_stream(cls) -> Self:
        """Handle 0: `default` under the name that says so."""
        return cls(0)


@dataclass(frozen=True, slots=True)
class EventHandle(Record):
    """Opaque id of an event.  [ME-HANDLE-2]"""

    value: U64


for _handle in (MemoryHandle, StreamHandle, EventHandle):
    setattr(_handle, "0", property(lambda handle: handle.value, doc="The id: upstream's tuple field."))
del _handle


@dataclass(frozen=True, slots=True)
class MemoryTransfer(Record):
    """One copy job, in bytes.  [ME-TRANSFER-1]"""

    src: MemoryHandle
    dst: MemoryHandle
    size: Usize
    src_offset: Usize
    dst_offset: Usize

    @classmethod
    def new(cls, src: MemoryHandle, dst: MemoryHandle, size: int) -> Self:
        """Both offsets 0."""
        return cls(src, dst, size, 0, 0)

    def with_src_offset(self, offset: int) -> Self:
        """A copy with that source offset. Pure."""
        return dataclasses.replace(self, src_offset=offset)

    def with_dst_offset(self, offset: int) -> Self:
        """A copy with that destination offset. Pure."""
        return dataclasses.replace(self, dst_offset=offset)


MEMORY_PRESSURE_THRESHOLDS = MemoryPressureThresholds(0.70, 0.85, 0.95)


@dataclass(frozen=True, slots=True)
class MemoryInfo(Record):
    """State of a device's memory.  [ME-INFO-1, ME-PRESSURE-1..3]"""

    total_bytes: U64
    used_bytes: U64
    free_bytes: U64
    reserved_bytes: U64
    active_allocations: Usize
    fragmentation_ratio: F32
    bandwidth_gbps: F32 | None

    def utilization_percent(self) -> float:
        """(100 * used) / total, each step rounded to float32; 0.0 when total is 0. Pure.  [ME-PRESSURE-3]"""
        if self.total_bytes == 0:
            return 0.0
        return float(np.float32(100) * np.float32(self.used_bytes) / np.float32(self.total_bytes))

    def pressure_level(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> MemoryPressure:
        """Low below 70 % used, Medium from there, High from 85 %, Critical from 95 %.  [ME-PRESSURE-1..3; D-38]

        used / total is divided in float64; UPSTREAM compares utilization_percent(), which is float32. Pure.
        """
        if parity_mode is ParityMode.UPSTREAM:
            percent = self.utilization_percent()
            return MemoryPressure(sum(percent >= limit for limit in (70.0, 85.0, 95.0)))
        fraction = min(1.0, self.used_bytes / self.total_bytes) if self.total_bytes else 0.0
        return MemoryPressure(pressure_from_fraction(fraction, MEMORY_PRESSURE_THRESHOLDS).value)


@dataclass(frozen=True, slots=True)
class MemoryHandleInfo(Record):
    """Facts about one allocation; `allocated_at` is monotonic seconds."""

    handle: MemoryHandle
    size: Usize
    device: Device
    alignment: Usize
    allocated_at: float
    is_mapped: bool
    memory_type: MemoryType


@dataclass(frozen=True, slots=True)
class MemoryPoolConfig(Record):
    """Policy of one pool, sizes in bytes.  [ME-CONFIG-1]"""

    initial_size: U64 = 1 << 30
    max_size: U64 | None = None
    growth_increment: U64 = 512 << 20
    enable_auto_expansion: bool = True
    alignment: Usize = 256
    pre_allocate: bool = False
    enable_stats: bool = True


@dataclass(frozen=True, slots=True)
class DefragmentationStats(Record):
    """What a compaction did; `memory_freed` in bytes."""

    memory_freed: U64
    blocks_moved: Usize
    time_taken_ms: U64
    fragmentation_before: F32
    fragmentation_after: F32


@dataclass(frozen=True, slots=True)
class MemoryAccessStats(Record):
    """Access counters of one allocation; sizes in bytes, `last_access` in monotonic seconds."""

    read_count: U64
    write_count: U64
    avg_read_size: Usize
    avg_write_size: Usize
    last_access: float
    pattern_type: AccessPatternType


def _only_general() -> dict[MemoryType, MemoryPoolConfig]:
    return {MemoryType.General: MemoryPoolConfig()}


@dataclass(frozen=True, slots=True)
class MemoryManagerConfig(Record):
    """Settings of a manager; `gc_threshold` is a fraction of the capacity in use.  [ME-CONFIG-1]"""

    pool_configs: dict[MemoryType, MemoryPoolConfig] = field(default_factory=_only_general)
    enable_tracking: bool = True
    enable_auto_gc: bool = True
    gc_threshold: F32 = 0.85
    enable_debug: bool = False
    max_concurrent_transfers: Usize = 4


@dataclass(frozen=True, slots=True)
class AllocationRequirements(Record):
    """Wishes for an allocation; `preferred_devices` best first."""

    preferred_devices: list[Device]
    memory_type: MemoryType
    alignment: Usize | None
    is_critical: bool
    expected_lifetime: timedelta | None
