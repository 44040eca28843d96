"""What the parts of a memory manager share: the lock, the devices, the live handles, and the pressure level.

Clauses: ME-ALLOC-6, ME-PRESSURE-4..6, ME-THREAD-1 (specs/memory.md).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.memory import MemoryHandle, MemoryManagerConfig, MemoryPressure, MemoryType
from ferrum_ref.numpy_backend.memory.arena import Bytes
from ferrum_ref.numpy_backend.memory.block import Block
from ferrum_ref.numpy_backend.memory.device import DeviceMemory
from ferrum_ref.numpy_backend.memory.handles import HandleTable
from ferrum_ref.numpy_backend.memory.placement import PlacementName
from ferrum_ref.numpy_backend.memory.pressure import Notifier
from ferrum_ref.types.devices import Device
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import check_unsigned


@dataclass(slots=True, eq=False)
class Allocation:
    """What a handle names: a block of `home`, seen as memory of `device`; mutable."""

    device: Device
    home: DeviceMemory
    block: Block
    mapping: memoryview | None = None
    mapped_bytes: weakref.ref[Bytes] | None = None  # alive as long as any view, slice or array of the mapping

    def bytes(self, offset: int, size: int) -> Bytes:
        """Those bytes of the block themselves."""
        start = self.block.offset + offset
        return self.home.pool(self.block.memory_type).view(start, start + size)

    def check_range(self, operation: str, offset: int, size: int) -> None:
        """Raises InvalidParameterError unless [offset, offset + size) lies in the allocation.  [ME-COPY-2]"""
        if offset < 0 or size < 0 or offset + size > self.block.size:
            raise InvalidParameterError(
                f"{operation}: bytes [{offset}, {offset + size}) of an allocation of {self.block.size} bytes;"
                " expected a range inside it"
            )


class MemoryState:
    """Guarded by `lock`; a change of the pressure level is delivered after the lock is released."""

    def __init__(
        self,
        capacities: Mapping[Device, int],
        config: MemoryManagerConfig,
        clock: Callable[[], float],
        placement: PlacementName,
        parity_mode: ParityMode,
    ) -> None:
        check_manager_config(config)
        self.config, self.clock, self.parity_mode = config, clock, parity_mode
        self.lock = threading.RLock()
        self.devices = {
            device: DeviceMemory(device, capacity, config, clock, placement) for device, capacity in capacities.items()
        }
        self.handles: HandleTable[Allocation] = HandleTable()
        self.notifier: Notifier[MemoryPressure] = Notifier()
        self._level = self.level()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the lock; afterwards check (in debug mode), and deliver a changed level outside the lock."""
        try:
            with self.lock:
                try:
                    yield
                finally:
                    level = self.level()
                    if level is not self._level:
                        self._level = level
                        self.notifier.push(level)
                if self.config.enable_debug:
                    self.check()
        finally:
            self.notifier.drain()

    def level(self) -> MemoryPressure:
        """The highest level of any device. Pure.  [ME-PRESSURE-4]"""
        levels = (memory.info().pressure_level(parity_mode=self.parity_mode) for memory in self.devices.values())
        return max(levels, default=MemoryPressure.Low)

    def memory_of(self, device: Device, operation: str) -> DeviceMemory:
        """Raises UnsupportedError for a device that the manager does not have."""
        memory = self.devices.get(device)
        if memory is None:
            served = ", ".join(str(device) for device in self.devices)
            raise UnsupportedError(f"{operation}: no memory of device {device} here; this manager has {served}")
        return memory

    def add(self, device: Device, home: DeviceMemory, block: Block) -> MemoryHandle:
        """A handle for a new block."""
        return self.handles.add(Allocation(device, home, block))

    def check(self) -> None:
        """Raises InternalError when handles, blocks and accounts disagree.  [ME-DEBUG-1]"""
        for memory in self.devices.values():
            memory.check()


def check_manager_config(config: MemoryManagerConfig) -> None:
    """Raises InvalidParameterError for settings without meaning.  [ME-CONFIG-2]"""
    if MemoryType.General not in config.pool_configs:
        raise InvalidParameterError(
            "MemoryManagerConfig: pool_configs must hold General, where allocate(size, device) takes its memory"
        )
    if not 0.0 <= config.gc_threshold <= 1.0:
        raise InvalidParameterError(f"MemoryManagerConfig: gc_threshold must be in [0, 1], got {config.gc_threshold}")
    if config.max_concurrent_transfers < 1:
        raise InvalidParameterError("MemoryManagerConfig: max_concurrent_transfers must be >= 1, got 0")


def check_size(size: int, operation: str) -> None:
    """Raises InvalidParameterError unless 1 <= size < 2**64.  [ME-ALLOC-1]"""
    if check_unsigned(size, 2**64, operation, "size") == 0:
        raise InvalidParameterError(f"{operation}: size must be >= 1, got 0; an empty allocation has no bytes to name")
