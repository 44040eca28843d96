"""The numpy memory manager: real arenas, one set of pools per device.

The `*_now` methods are the synchronous core; the contract's `async` methods call them and never suspend. Extensions
beyond the contract: `write`, `read`, `fill`, `reallocate`, `allocate_for`, `usage`, `layout`, listeners.
Clauses: ME-* in specs/memory.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ferrum_ref.errors import BackendError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import (
    AdvancedMemoryManager,
    AllocationRequirements,
    AllocationStrategy,
    BestFitStrategy,
    DefragmentationStats,
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
from ferrum_ref.numpy_backend.memory import mapping
from ferrum_ref.numpy_backend.memory.placement import PlacementName
from ferrum_ref.numpy_backend.memory.pool import PoolUsage, check_alignment
from ferrum_ref.numpy_backend.memory.state import MemoryState, check_size
from ferrum_ref.numpy_backend.memory.streams import NumpyStreamManager
from ferrum_ref.numpy_backend.memory.transfers import HostData, Transfers
from ferrum_ref.types.devices import Device
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import check_unsigned

DEFAULT_CAPACITY_BYTES = 4 << 30

PressureListener = Callable[[MemoryPressure], None]


class NumpyMemoryManager(AdvancedMemoryManager):
    """Memory of `device` and of `peers` (device -> capacity in bytes), thread-safe.  [ME-*; D-38, D-47]

    Pages are taken from the operating system when first touched. `streams` runs queued copies; without one the manager
    has its own. `clock` gives seconds. UPSTREAM does what upstream's one manager did, where that is a result
    (ME-PARITY-1).
    Raises InvalidParameterError for a bad setting.
    """

    def __init__(
        self,
        device: Device = Device.CPU,
        capacity_bytes: int = DEFAULT_CAPACITY_BYTES,
        config: MemoryManagerConfig | None = None,
        *,
        peers: Mapping[Device, int] | None = None,
        streams: NumpyStreamManager | None = None,
        placement: PlacementName = "best_fit",
        clock: Callable[[], float] = time.monotonic,
        parity_mode: ParityMode = ParityMode.REFERENCE,
    ) -> None:
        capacities = {device: capacity_bytes, **(peers or {})}
        for name, capacity in capacities.items():
            check_unsigned(capacity, 2**63, "NumpyMemoryManager", f"capacity_bytes of {name}")
        self.streams = NumpyStreamManager() if streams is None else streams
        self._device = device
        self._state = MemoryState(capacities, config or MemoryManagerConfig(), clock, placement, parity_mode)
        self._transfers = Transfers(self._state, self.streams)

    def devices(self) -> list[Device]:
        """The devices whose memory this is, its own first. Pure."""
        return list(self._state.devices)

    # Allocations.
    def allocate_now(
        self, size: int, device: Device, alignment: int = 1, memory_type: MemoryType = MemoryType.General
    ) -> MemoryHandle:
        """As `allocate`, with an alignment and a memory type.  [ME-ALLOC-1..5, ME-POOL-6]"""
        state = self._state
        check_size(size, "allocate")
        check_alignment(alignment, "allocate")
        with state.change():
            memory = state.memory_of(device, "allocate")
            upstream = state.parity_mode is ParityMode.UPSTREAM
            block = memory.new_block(size, alignment, memory_type, pad_only=upstream)
            if block is None:
                raise self._exhausted("allocate", size, device)
            return state.add(device, memory, block)

    def allocate_for_now(
        self, size: int, requirements: AllocationRequirements, strategy: AllocationStrategy | None = None
    ) -> MemoryHandle:
        """Where the strategy (best fit if none) says.  [ME-STRATEGY-5]

        Raises ResourceExhaustedError when it names no device.
        """
        with self._state.lock:
            infos = {device: memory.info() for device, memory in self._state.devices.items()}
            chosen = (strategy or BestFitStrategy()).select_device(size, requirements, list(infos), infos)
        if chosen is None:
            raise ResourceExhaustedError(f"allocate_for: no device has {size} bytes free; free some memory first")
        return self.allocate_now(size, chosen, requirements.alignment or 1, requirements.memory_type)

    def deallocate_now(self, handle: MemoryHandle) -> None:
        """See `DeviceMemoryManager.deallocate`."""
        state = self._state
        with state.change():
            if state.parity_mode is ParityMode.UPSTREAM and state.handles.peek(handle) is None:
                return
            allocation = state.handles.get(handle, "deallocate")
            if allocation.mapping is not None:
                raise InvalidParameterError(f"deallocate: handle {handle.id()} is mapped; unmap_memory comes first")
            state.handles.remove(handle, "deallocate")
            allocation.block.num_handles -= 1
            if allocation.block.num_handles == 0:
                allocation.home.release(allocation.block)

    def reallocate_now(self, handle: MemoryHandle, size: int) -> None:
        """Another size for the same handle; the common bytes stay and new ones are zero.  [ME-REALLOC-1..3]

        Raises InvalidParameterError: size < 1, mapped or shared; ResourceExhaustedError with the allocation unchanged.
        """
        check_size(size, "reallocate")
        with self._state.change():
            allocation = self._state.handles.get(handle, "reallocate")
            if allocation.block.num_maps or allocation.block.memory_type is MemoryType.Mapped:
                raise InvalidParameterError(
                    f"reallocate: handle {handle.id()} is mapped or shared; its size cannot change before that ends"
                )
            if not allocation.home.resize(allocation.block, size):
                raise self._exhausted("reallocate", size, allocation.home.device)

    # Bytes.
    def copy_now(self, transfer: MemoryTransfer) -> None:
        """See `DeviceMemoryManager.copy`."""
        self._transfers.copy(transfer)

    def write(self, handle: MemoryHandle, data: HostData, offset: int = 0) -> None:
        """Host to device: allocation[offset:][:len(data)] = data.  [ME-HOST-1]

        Raises NotFoundError; InvalidParameterError, nothing written, when it does not fit.
        """
        self._transfers.write(handle, data, offset)

    def read(self, handle: MemoryHandle, size: int | None = None, offset: int = 0) -> bytes:
        """Device to host: a copy of allocation[offset:][:size], None to the end.  [ME-HOST-1]"""
        return self._transfers.read(handle, size, offset)

    def fill(self, handle: MemoryHandle, value: int, size: int | None = None, offset: int = 0) -> None:
        """allocation[offset:][:size] = value in every byte.  [ME-HOST-2]"""
        self._transfers.fill(handle, value, size, offset)

    # Figures, all pure.
    def memory_info_now(self, device: Device) -> MemoryInfo:
        """See `DeviceMemoryManager.memory_info`."""
        with self._state.lock:
            return self._state.memory_of(device, "memory_info").info()

    def handle_info(self, handle: MemoryHandle) -> MemoryHandleInfo | None:
        with self._state.lock:
            allocation = self._state.handles.peek(handle)
            if allocation is None:
                return None
            block = allocation.block
            return MemoryHandleInfo(
                handle=handle,
                size=block.size,
                device=allocation.device,
                alignment=block.alignment,
                allocated_at=block.allocated_s,
                is_mapped=allocation.mapping is not None,
                memory_type=block.memory_type,
            )

    def access_stats(self, handle: MemoryHandle) -> MemoryAccessStats | None:
        with self._state.lock:
            allocation = self._state.handles.peek(handle)
            return None if allocation is None or allocation.block.log is None else allocation.block.log.stats()

    def usage_hint(self, handle: MemoryHandle) -> MemoryUsageHint | None:
        """The hint of a live handle, None when it has none.  Raises NotFoundError.  [ME-ACCESS-3]"""
        with self._state.lock:
            return self._state.handles.get(handle, "usage_hint").block.hint

    def usage(self, device: Device) -> dict[MemoryType, PoolUsage]:
        """Where every byte of every pool is.  [ME-INFO-2]"""
        with self._state.lock:
            pools = self._state.memory_of(device, "usage").pools
            return {memory_type: pool.usage() for memory_type, pool in pools.items()}

    def layout(self, device: Device) -> list[tuple[MemoryHandle, MemoryType, int, int]]:
        """(handle, pool, offset, extent) of every block at home on the device, by pool and address.  [ME-DEFRAG-1]"""
        with self._state.lock:
            memory = self._state.memory_of(device, "layout")
            found = [
                (handle, memory.pool(one.block.memory_type).memory_type, one.block.offset, one.block.extent)
                for handle, one in self._state.handles.items()
                if one.home is memory
            ]
        order = list(MemoryType)
        return sorted(found, key=lambda row: (order.index(row[1]), row[2], row[0].id()))

    def check_invariants(self) -> None:
        """Raises InternalError when blocks overlap or accounts disagree with what is there.  [ME-DEBUG-1]"""
        with self._state.lock:
            self._state.check()

    # Policy.
    def configure_pool_now(
        self, device: Device, config: MemoryPoolConfig, memory_type: MemoryType = MemoryType.General
    ) -> None:
        """As `configure_pool`, for the pool that serves a memory type.  [ME-POOL-5]"""
        with self._state.change():
            memory = self._state.memory_of(device, "configure_pool")
            if self._state.parity_mode is ParityMode.REFERENCE:
                memory.pool(memory_type).configure(config)

    def defragment_now(self, device: Device) -> DefragmentationStats:
        """See `DeviceMemoryManager.defragment`."""
        with self._state.change():
            return self._state.memory_of(device, "defragment").defragment()

    def set_pressure_callback(self, callback: PressureListener) -> None:
        self._state.notifier.set_callback(callback)

    def add_pressure_listener(self, listener: PressureListener) -> None:
        """Hear of level changes beside the one callback, as a monitor does.  [ME-PRESSURE-5]"""
        self._state.notifier.add(listener)

    def remove_pressure_listener(self, listener: PressureListener) -> None:
        """Stop hearing; an unknown listener is no error."""
        self._state.notifier.remove(listener)

    # The contract.
    async def allocate(self, size: int, device: Device) -> MemoryHandle:
        return self.allocate_now(size, device)

    async def allocate_aligned(self, size: int, alignment: int, device: Device) -> MemoryHandle:
        return self.allocate_now(size, device, alignment)

    async def deallocate(self, handle: MemoryHandle) -> None:
        self.deallocate_now(handle)

    async def copy(self, src: MemoryHandle, dst: MemoryHandle, size: int, src_offset: int, dst_offset: int) -> None:
        self.copy_now(MemoryTransfer(src, dst, size, src_offset, dst_offset))

    async def copy_async(self, transfer: MemoryTransfer, stream: StreamHandle | None) -> None:
        self._transfers.queue(transfer, StreamHandle.default() if stream is None else stream)

    async def memory_info(self, device: Device) -> MemoryInfo:
        return self.memory_info_now(device)

    async def configure_pool(self, device: Device, config: MemoryPoolConfig) -> None:
        self.configure_pool_now(device, config)

    async def defragment(self, device: Device) -> DefragmentationStats:
        return self.defragment_now(device)

    async def map_memory(self, handle: MemoryHandle, access: MemoryAccess) -> memoryview:
        return mapping.map_memory(self._state, handle, access)

    async def unmap_memory(self, handle: MemoryHandle) -> None:
        mapping.unmap_memory(self._state, handle)

    async def create_mapping(
        self, src_device: Device, dst_device: Device, size: int
    ) -> tuple[MemoryHandle, MemoryHandle]:
        with self._state.change():
            return mapping.create_mapping(self._state, src_device, dst_device, size)

    async def prefetch(self, handle: MemoryHandle, target_device: Device) -> None:
        with self._state.change():
            mapping.prefetch(self._state, handle, target_device)

    async def set_usage_hint(self, handle: MemoryHandle, hint: MemoryUsageHint) -> None:
        with self._state.lock:
            self._state.handles.get(handle, "set_usage_hint").block.hint = hint

    def _exhausted(self, operation: str, size: int, device: Device) -> ResourceExhaustedError | BackendError:
        info = self._state.devices[device].info()
        kind = BackendError if self._state.parity_mode is ParityMode.UPSTREAM else ResourceExhaustedError
        return kind(
            f"{operation}: no room for {size} bytes on {device}: {info.free_bytes} of {info.total_bytes} bytes free,"
            f" fragmentation {info.fragmentation_ratio:.3f}; free or defragment, or raise the pool's max_size"
        )
