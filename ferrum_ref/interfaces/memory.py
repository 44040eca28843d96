"""Device memory: raw allocations, copies, mappings, streams, and a view over several managers.

Bytes only; unrelated to KV blocks. Every implementation is safe to call from any thread (D-47).
Upstream: `ferrum_interfaces::memory`; its records are in `memory_data.py`, the choice of a device in
`memory_strategy.py`, both re-exported here.  Clauses: ME-* in specs/memory.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ferrum_ref.interfaces.memory_data import (
    MEMORY_PRESSURE_THRESHOLDS,
    AccessPatternType,
    AllocationRequirements,
    DefragmentationStats,
    EventHandle,
    MemoryAccess,
    MemoryAccessStats,
    MemoryHandle,
    MemoryHandleInfo,
    MemoryInfo,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryPressure,
    MemoryTransfer,
    MemoryType,
    MemoryUsageHint,
    StreamHandle,
)
from ferrum_ref.interfaces.memory_strategy import AllocationStrategy, BestFitStrategy
from ferrum_ref.types.devices import Device

__all__ = [
    "MEMORY_PRESSURE_THRESHOLDS", "AccessPatternType", "AdvancedMemoryManager", "AllocationRequirements",
    "AllocationStrategy", "BestFitStrategy", "DefragmentationStats", "DeviceMemoryManager", "EventHandle",
    "GlobalMemoryMonitor", "MemoryAccess", "MemoryAccessStats", "MemoryHandle", "MemoryHandleInfo", "MemoryInfo",
    "MemoryManagerConfig", "MemoryManagerFactory", "MemoryPoolConfig", "MemoryPressure", "MemoryTransfer",
    "MemoryType", "MemoryUsageHint", "StreamHandle", "StreamManager",
]  # fmt: skip


class DeviceMemoryManager(ABC):
    """Raw allocations on devices.  [ME-ALLOC-*, ME-COPY-*, ME-INFO-*, ME-POOL-*, ME-DEFRAG-*, ME-PRESSURE-*]

    Every method raises NotFoundError for a handle that is not alive and UnsupportedError for a device it does not have.
    """

    @abstractmethod
    async def allocate(self, size: int, device: Device) -> MemoryHandle:
        """`size` zero bytes in the General pool, aligned as the pool says.  [ME-ALLOC-1..4]

        Raises InvalidParameterError: size < 1; ResourceExhaustedError, nothing changed: no room.
        """

    @abstractmethod
    async def allocate_aligned(self, size: int, alignment: int, device: Device) -> MemoryHandle:
        """As `allocate`, the start address a multiple of `alignment` too.  [ME-ALLOC-5]

        Raises InvalidParameterError unless alignment is a power of two of at most 2 MiB.
        """

    @abstractmethod
    async def deallocate(self, handle: MemoryHandle) -> None:
        """Give the block back; the handle is dead for good.  [ME-ALLOC-6..7]

        Raises InvalidParameterError while the handle is mapped.
        """

    @abstractmethod
    async def copy(self, src: MemoryHandle, dst: MemoryHandle, size: int, src_offset: int, dst_offset: int) -> None:
        """dst[dst_offset:][:size] = src[src_offset:][:size] as memmove, finished on return.  [ME-COPY-1..2]

        Raises InvalidParameterError, nothing copied, when a range leaves its allocation.
        """

    @abstractmethod
    async def copy_async(self, transfer: MemoryTransfer, stream: StreamHandle | None) -> None:
        """Queue a copy on a stream; None or stream 0: as `copy`.  [ME-COPY-3..5]

        Raises as `copy`, at once; NotFoundError for an unknown stream.
        """

    @abstractmethod
    async def memory_info(self, device: Device) -> MemoryInfo:
        """Snapshot of a device. Pure.  [ME-INFO-1..3]"""

    @abstractmethod
    def handle_info(self, handle: MemoryHandle) -> MemoryHandleInfo | None:
        """Facts about an allocation; None when it is not alive. Pure.  [ME-ALLOC-8]"""

    @abstractmethod
    async def configure_pool(self, device: Device, config: MemoryPoolConfig) -> None:
        """Replace the policy of the device's General pool; live blocks stay.  [ME-POOL-5]

        Raises InvalidParameterError: a bad setting; ResourceExhaustedError: live blocks lie above the new limit.
        """

    @abstractmethod
    async def defragment(self, device: Device) -> DefragmentationStats:
        """Move live blocks together; handles and contents stay.  [ME-DEFRAG-1..5]"""

    @abstractmethod
    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Install the one callback that hears of a changed pressure level.  [ME-PRESSURE-4..6; D-38]"""


class AdvancedMemoryManager(DeviceMemoryManager):
    """Mappings, migration and hints on top.  [ME-MAP-*, ME-SHARE-*, ME-ACCESS-*]"""

    @abstractmethod
    async def map_memory(self, handle: MemoryHandle, access: MemoryAccess) -> memoryview:
        """The allocation's own bytes, read-only for ReadOnly; the block does not move until unmapped.  [ME-MAP-1..3]

        Raises AlreadyExistsError when the handle is mapped.
        """

    @abstractmethod
    async def unmap_memory(self, handle: MemoryHandle) -> None:
        """End the mapping: the view is released.  [ME-MAP-2..3]

        Raises InvalidParameterError when the handle is not mapped; also, the handle staying mapped, while slices or
        arrays made from the view are alive.
        """

    @abstractmethod
    async def create_mapping(
        self, src_device: Device, dst_device: Device, size: int
    ) -> tuple[MemoryHandle, MemoryHandle]:
        """Two handles, one on each device, of one shared region of `size` bytes.  [ME-SHARE-1..2]"""

    @abstractmethod
    async def prefetch(self, handle: MemoryHandle, target_device: Device) -> None:
        """Move the allocation to another device; the handle and the contents stay.  [ME-SHARE-3]

        Raises InvalidParameterError for a block that must not move; ResourceExhaustedError, nothing changed.
        """

    @abstractmethod
    def access_stats(self, handle: MemoryHandle) -> MemoryAccessStats | None:
        """Counters; None when not alive or not tracked. Pure.  [ME-ACCESS-1..2]"""

    @abstractmethod
    async def set_usage_hint(self, handle: MemoryHandle, hint: MemoryUsageHint) -> None:
        """Attach a hint; a Resident block does not move until it gets another.  [ME-ACCESS-3]"""


class StreamManager(ABC):
    """Queues of work and the events that order them.  [ME-STREAM-1..8, ME-EVENT-1..4]

    Every method raises NotFoundError for an unknown or destroyed stream and for an unknown event.
    """

    @abstractmethod
    async def create_stream(self, device: Device) -> StreamHandle:
        """A new empty queue; its id was never used before and is not 0.  [ME-STREAM-1]"""

    @abstractmethod
    async def destroy_stream(self, stream: StreamHandle) -> None:
        """Finish the queue's work, then retire it; raises its unreported error.  [ME-STREAM-5]

        Raises InvalidParameterError for stream 0.
        """

    @abstractmethod
    async def synchronize_stream(self, stream: StreamHandle) -> None:
        """Run until the queue is empty; raises the stream's error once.  [ME-STREAM-3, ME-STREAM-6..7]"""

    @abstractmethod
    async def is_stream_ready(self, stream: StreamHandle) -> bool:
        """True when nothing is pending. The devices get on by one operation first.  [ME-STREAM-4]"""

    @abstractmethod
    def default_stream(self, device: Device) -> StreamHandle:
        """Handle 0. Pure.  [ME-STREAM-2]"""

    @abstractmethod
    async def record_event(self, stream: StreamHandle) -> EventHandle:
        """A marker after all work queued so far.  [ME-EVENT-1]"""

    @abstractmethod
    async def wait_event(self, stream: StreamHandle, event: EventHandle) -> None:
        """Later work on `stream` starts only after the event completed.  [ME-EVENT-2..4]"""


class MemoryManagerFactory(ABC):
    """Creates managers.  [ME-FACTORY-1..2]"""

    @abstractmethod
    async def create_memory_manager(self, device: Device, config: MemoryManagerConfig) -> DeviceMemoryManager:
        """A manager of the device's memory.  Raises UnsupportedError: a device it does not have."""

    @abstractmethod
    async def create_advanced_memory_manager(
        self, device: Device, config: MemoryManagerConfig
    ) -> AdvancedMemoryManager:
        """The same with mappings and hints."""

    @abstractmethod
    async def create_stream_manager(self, device: Device) -> StreamManager:
        """The stream manager of a device, on which its memory managers' copies run."""


class GlobalMemoryMonitor(ABC):
    """One view over the managers of a process.  [ME-MONITOR-1..5; D-47]"""

    @abstractmethod
    def global_memory_info(self) -> dict[Device, MemoryInfo]:
        """Snapshot per registered device, in order of registration. Pure.  [ME-MONITOR-1]"""

    @abstractmethod
    def global_memory_pressure(self) -> MemoryPressure:
        """The highest level of any device; Low without devices. Pure.  [ME-MONITOR-2; D-38]"""

    @abstractmethod
    def register_manager(self, device: Device, manager: DeviceMemoryManager) -> None:
        """Track a manager for a device, in place of the one before.  [ME-MONITOR-1]"""

    @abstractmethod
    def unregister_manager(self, device: Device) -> None:
        """Stop tracking.  Raises NotFoundError for a device without manager.  [ME-MONITOR-1]"""

    @abstractmethod
    def set_global_pressure_callback(self, callback: Callable[[dict[Device, MemoryPressure]], None]) -> None:
        """Install the one callback; it receives the level of every device when one changed.  [ME-MONITOR-3]"""

    @abstractmethod
    async def global_gc(self) -> dict[Device, DefragmentationStats]:
        """Defragment every device.  [ME-MONITOR-4]"""
