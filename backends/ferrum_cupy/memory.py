"""The memory manager of one device: handles over blocks of device memory that may move.

The `*_now` methods are the synchronous core; the contract's `async` methods call them and never suspend. Beyond the
contract: `write`, `read`, `fill`, `reallocate_now`, `allocate_for_now`, `borrow`, `usage`, `layout`, listeners.
Clauses: BK-CUPY-20..28 (specs/backend_cupy.md), ME-* (specs/memory.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ferrum_cupy.machine import DeviceArray, Machine
from ferrum_cupy.memory_device import DeviceMemory
from ferrum_cupy.memory_handles import HandleTable, check_size
from ferrum_cupy.memory_pool import PoolUsage, check_alignment
from ferrum_cupy.memory_pressure import Listener, PressureNotifier
from ferrum_cupy.memory_region import Block
from ferrum_cupy.memory_streams import CupyStreamManager, no_check
from ferrum_cupy.memory_transfers import HostData, Transfers
from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.memory import (
    AllocationRequirements,
    AllocationStrategy,
    BestFitStrategy,
    DefragmentationStats,
    DeviceMemoryManager,
    MemoryHandle,
    MemoryHandleInfo,
    MemoryInfo,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryPressure,
    MemoryTransfer,
    MemoryType,
    StreamHandle,
)
from ferrum_ref.types.devices import Device
from ferrum_ref.types.record import check_unsigned


class CupyMemoryManager(DeviceMemoryManager):
    """At most `capacity_bytes` of the machine's device; None: what it can lend now. Safe from any thread.

    `streams` queues copies; without one the manager has its own. `clock` gives seconds. `check_open(operation)` raises
    when the backend was shut down.
    Raises InvalidParameterError for a bad setting; ResourceExhaustedError when a pre-allocated pool is not to be had.
    """

    def __init__(
        self,
        machine: Machine,
        capacity_bytes: int | None = None,
        config: MemoryManagerConfig | None = None,
        *,
        streams: CupyStreamManager | None = None,
        clock: Callable[[], float] = time.monotonic,
        check_open: Callable[[str], None] = no_check,
    ) -> None:
        capacity = machine.lendable_bytes() if capacity_bytes is None else capacity_bytes
        check_unsigned(capacity, 2**63, "CupyMemoryManager", "capacity_bytes")
        settings = config or MemoryManagerConfig()
        self.streams = CupyStreamManager(machine, check_open) if streams is None else streams
        self._device, self._clock, self._check_open = machine.device, clock, check_open
        self._debug = settings.enable_debug
        self._lock = threading.RLock()
        self._memory = DeviceMemory(machine, capacity, settings, clock)
        self._handles = HandleTable()
        self._notifier = PressureNotifier()
        self._level = self._memory.info().pressure_level()
        self._transfers = Transfers(
            machine, self._memory, self._handles, self.streams, self._lock, clock, settings.max_concurrent_transfers
        )

    # Allocations.
    def allocate_now(
        self, size: int, device: Device, alignment: int = 1, memory_type: MemoryType = MemoryType.General
    ) -> MemoryHandle:
        """As `allocate`, with an alignment and a memory type.  [ME-ALLOC-1..5, ME-POOL-6]"""
        check_size(size, "allocate")
        check_alignment(alignment, "allocate")
        with self._change("allocate"):
            self._check_device("allocate", device)
            block = self._memory.new_block(size, alignment, memory_type)
            if block is None:
                raise self._exhausted("allocate", size)
            return self._handles.add(block)

    def allocate_for_now(
        self, size: int, requirements: AllocationRequirements, strategy: AllocationStrategy | None = None
    ) -> MemoryHandle:
        """Where the strategy (best fit if none) says.  [ME-STRATEGY-5]

        Raises ResourceExhaustedError when it does not name the device.
        """
        info = {self._device: self.memory_info_now(self._device)}
        chosen = (strategy or BestFitStrategy()).select_device(size, requirements, [self._device], info)
        if chosen is None:
            raise ResourceExhaustedError(f"allocate_for: no device has {size} bytes free; free some memory first")
        return self.allocate_now(size, chosen, requirements.alignment or 1, requirements.memory_type)

    def deallocate_now(self, handle: MemoryHandle) -> None:
        """See `DeviceMemoryManager.deallocate`; waits for queued copies of the allocation.  [BK-CUPY-27]"""
        with self._change("deallocate"):
            block = self._handles.get(handle, "deallocate")
            _check_not_borrowed("deallocate", handle, block)
            block.settle()
            self._handles.remove(handle)
            block.region.release(block)

    def reallocate_now(self, handle: MemoryHandle, size: int) -> None:
        """Another size for the same handle; the common bytes stay and new ones are zero.  [ME-REALLOC-1..3]

        Raises InvalidParameterError: size < 1, or borrowed; ResourceExhaustedError with the allocation unchanged.
        """
        check_size(size, "reallocate")
        with self._change("reallocate"):
            block = self._handles.get(handle, "reallocate")
            _check_not_borrowed("reallocate", handle, block)
            if not self._memory.resize(block, size):
                raise self._exhausted("reallocate", size)

    @contextmanager
    def borrow(self, handle: MemoryHandle) -> Iterator[DeviceArray]:
        """The allocation's own bytes as a uint8 array of the device; it neither moves nor ends meanwhile.  [BK-CUPY-24]

        Copies queued on it before are waited for.
        """
        with self._opened("borrow"):
            block = self._handles.get(handle, "borrow")
            block.settle()
            block.num_borrowers += 1
            view = block.region.view(block.offset, block.offset + block.size)
        try:
            yield view
        finally:
            with self._lock:
                block.num_borrowers -= 1

    # Bytes.
    def copy_now(self, transfer: MemoryTransfer) -> None:
        """See `DeviceMemoryManager.copy`."""
        self._check_open("copy")
        self._transfers.copy(transfer)

    def copy_async_now(self, transfer: MemoryTransfer, stream: StreamHandle | None) -> None:
        """See `DeviceMemoryManager.copy_async`."""
        self._check_open("copy_async")
        self._transfers.queue(transfer, StreamHandle.default() if stream is None else stream)

    def write(self, handle: MemoryHandle, data: HostData, offset: int = 0) -> None:
        """Host to device: allocation[offset:][:len(data)] = data.  [ME-HOST-1]

        Raises NotFoundError; InvalidParameterError, nothing written, when it does not fit.
        """
        self._check_open("write")
        self._transfers.write(handle, data, offset)

    def read(self, handle: MemoryHandle, size: int | None = None, offset: int = 0) -> bytes:
        """Device to host: a copy of allocation[offset:][:size], None to the end.  [ME-HOST-1]"""
        self._check_open("read")
        return self._transfers.read(handle, size, offset)

    def fill(self, handle: MemoryHandle, value: int, size: int | None = None, offset: int = 0) -> None:
        """allocation[offset:][:size] = value in every byte.  [ME-HOST-2]"""
        self._check_open("fill")
        self._transfers.fill(handle, value, size, offset)

    # Figures, all pure.
    def memory_info_now(self, device: Device) -> MemoryInfo:
        """See `DeviceMemoryManager.memory_info`."""
        with self._lock:
            self._check_device("memory_info", device)
            return self._memory.info()

    def handle_info(self, handle: MemoryHandle) -> MemoryHandleInfo | None:
        with self._lock:
            block = self._handles.peek(handle)
            if block is None:
                return None
            return MemoryHandleInfo(
                handle=handle,
                size=block.size,
                device=self._device,
                alignment=block.alignment,
                allocated_at=block.allocated_s,
                is_mapped=False,
                memory_type=block.memory_type,
            )

    def usage(self, device: Device) -> dict[MemoryType, PoolUsage]:
        """Where every byte of every pool is.  [ME-INFO-2]"""
        with self._lock:
            self._check_device("usage", device)
            return {memory_type: pool.usage() for memory_type, pool in self._memory.pools.items()}

    def layout(self, device: Device) -> list[tuple[MemoryHandle, MemoryType, int, int]]:
        """(handle, pool, device address, extent) of every block, by pool and address.  [BK-CUPY-22]"""
        with self._lock:
            self._check_device("layout", device)
            found = [
                (handle, self._memory.pool(b.memory_type).memory_type, b.region.address(b.offset), b.extent)
                for handle, b in self._handles.items()
            ]
        order = list(MemoryType)
        return sorted(found, key=lambda row: (order.index(row[1]), row[2]))

    def check_invariants(self) -> None:
        """Raises InternalError when blocks overlap or accounts disagree with what is there.  [ME-DEBUG-1]"""
        with self._lock:
            self._memory.check()

    # Policy.
    def configure_pool_now(
        self, device: Device, config: MemoryPoolConfig, memory_type: MemoryType = MemoryType.General
    ) -> None:
        """As `configure_pool`, for the pool that serves a memory type.  [ME-POOL-5]"""
        with self._change("configure_pool"):
            self._check_device("configure_pool", device)
            self._memory.pool(memory_type).configure(config)

    def defragment_now(self, device: Device) -> DefragmentationStats:
        """See `DeviceMemoryManager.defragment`.  [BK-CUPY-25]"""
        with self._change("defragment"):
            self._check_device("defragment", device)
            return self._memory.defragment()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        self._notifier.set_callback(callback)

    def add_pressure_listener(self, listener: Listener) -> None:
        """Hear of level changes beside the one callback, as a monitor does.  [ME-PRESSURE-5]"""
        self._notifier.add(listener)

    def remove_pressure_listener(self, listener: Listener) -> None:
        """Stop hearing; an unknown listener is no error."""
        self._notifier.remove(listener)

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
        self.copy_async_now(transfer, stream)

    async def memory_info(self, device: Device) -> MemoryInfo:
        return self.memory_info_now(device)

    async def configure_pool(self, device: Device, config: MemoryPoolConfig) -> None:
        self.configure_pool_now(device, config)

    async def defragment(self, device: Device) -> DefragmentationStats:
        return self.defragment_now(device)

    @contextmanager
    def _opened(self, operation: str) -> Iterator[None]:
        self._check_open(operation)
        with self._lock:
            yield

    @contextmanager
    def _change(self, operation: str) -> Iterator[None]:
        """Hold the lock; afterwards check (in debug mode), and deliver a changed level outside the lock."""
        try:
            with self._opened(operation):
                try:
                    yield
                finally:
                    level = self._memory.info().pressure_level()
                    if level is not self._level:
                        self._level = level
                        self._notifier.push(level)
                if self._debug:
                    self._memory.check()
        finally:
            self._notifier.deliver()

    def _check_device(self, operation: str, device: Device) -> None:
        if device != self._device:
            raise UnsupportedError(f"{operation}: no memory of device {device} here; this manager has {self._device}")

    def _exhausted(self, operation: str, size: int) -> ResourceExhaustedError:
        info = self._memory.info()
        return ResourceExhaustedError(
            f"{operation}: no room for {size} bytes on {self._device}: {info.free_bytes} of {info.total_bytes} bytes "
            f"free by the accounts, fragmentation {info.fragmentation_ratio:.3f}; free or defragment, raise the pool's "
            "max_size, or leave the device more memory"
        )


def _check_not_borrowed(operation: str, handle: MemoryHandle, block: Block) -> None:
    if block.num_borrowers:
        raise InvalidParameterError(f"{operation}: handle {handle.id()} is borrowed; end that first")
