"""Makes the memory managers of one machine and the streams they copy on.  Clauses: BK-CUPY-20, ME-FACTORY-1..2."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from ferrum_cupy.machine import Machine
from ferrum_cupy.memory import CupyMemoryManager
from ferrum_cupy.memory_streams import CupyStreamManager, no_check
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.memory import MemoryManagerConfig, MemoryManagerFactory
from ferrum_ref.types.devices import Device


class CupyMemoryManagerFactory(MemoryManagerFactory):
    """Managers of one machine's device, each with regions of its own; all queue copies on one stream manager."""

    def __init__(
        self, machine: Machine, capacity_bytes: int | None = None, *, check_open: Callable[[str], None] = no_check
    ) -> None:
        self._machine, self._capacity_bytes, self._check_open = machine, capacity_bytes, check_open
        self._streams = CupyStreamManager(machine, check_open)

    async def create_memory_manager(self, device: Device, config: MemoryManagerConfig) -> CupyMemoryManager:
        self._check_device("create_memory_manager", device)
        return CupyMemoryManager(
            self._machine, self._capacity_bytes, config, streams=self._streams, check_open=self._check_open
        )

    async def create_advanced_memory_manager(self, device: Device, config: MemoryManagerConfig) -> NoReturn:
        """Raises UnsupportedError: the host has no view of device memory to map.  [BK-CUPY-20]"""
        self._check_device("create_advanced_memory_manager", device)
        raise UnsupportedError(
            "create_advanced_memory_manager: device memory of the cupy backend cannot be mapped into the host; "
            "create_memory_manager gives one with read, write and borrow"
        )

    async def create_stream_manager(self, device: Device) -> CupyStreamManager:
        self._check_device("create_stream_manager", device)
        return self._streams

    def _check_device(self, operation: str, device: Device) -> None:
        if device != self._machine.device:
            raise UnsupportedError(f"{operation}: no device {device} here; this backend drives {self._machine.device}")
