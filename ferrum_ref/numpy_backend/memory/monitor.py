"""One view over the memory managers of a process.  Clauses: ME-MONITOR-1..5 (specs/memory.md)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, runtime_checkable

from ferrum_ref.errors import NotFoundError, UnsupportedError
from ferrum_ref.interfaces.memory import (
    DefragmentationStats,
    DeviceMemoryManager,
    GlobalMemoryMonitor,
    MemoryInfo,
    MemoryPressure,
)
from ferrum_ref.numpy_backend.memory.pressure import Notifier
from ferrum_ref.types.devices import Device

Result = TypeVar("Result")
Levels = dict[Device, MemoryPressure]


@runtime_checkable
class PressureSource(Protocol):
    """A manager that lets several parties hear of its pressure."""

    def add_pressure_listener(self, listener: Callable[[MemoryPressure], None]) -> None: ...

    def remove_pressure_listener(self, listener: Callable[[MemoryPressure], None]) -> None: ...


class NumpyGlobalMemoryMonitor(GlobalMemoryMonitor):
    """Works with any DeviceMemoryManager whose `memory_info` answers without suspending; thread-safe.  [D-47]

    A manager without listeners gives the monitor its one callback.  [ME-MONITOR-5]
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._managers: dict[Device, DeviceMemoryManager] = {}
        self._reported: Levels = {}
        self._notifier: Notifier[Levels] = Notifier()

    def global_memory_info(self) -> dict[Device, MemoryInfo]:
        with self._lock:
            managers = dict(self._managers)
        return {device: _at_once(manager.memory_info(device), device) for device, manager in managers.items()}

    def global_memory_pressure(self) -> MemoryPressure:
        return max(self._levels().values(), default=MemoryPressure.Low)

    def register_manager(self, device: Device, manager: DeviceMemoryManager) -> None:
        _at_once(manager.memory_info(device), device)
        with self._lock:
            old = self._managers.get(device)
            self._managers[device] = manager
            self._forget(old)
        if isinstance(manager, PressureSource):
            manager.add_pressure_listener(self._on_change)
        else:
            manager.set_pressure_callback(self._on_change)
        with self._lock:
            self._reported = self._levels()

    def unregister_manager(self, device: Device) -> None:
        with self._lock:
            manager = self._managers.pop(device, None)
            if manager is None:
                raise NotFoundError(f"unregister_manager: no manager is registered for {device}")
            self._forget(manager)
            self._reported = self._levels()

    def set_global_pressure_callback(self, callback: Callable[[Levels], None]) -> None:
        with self._lock:
            self._notifier.set_callback(callback)
            self._reported = self._levels()

    async def global_gc(self) -> dict[Device, DefragmentationStats]:
        with self._lock:
            managers = dict(self._managers)
        return {device: await manager.defragment(device) for device, manager in managers.items()}

    def _levels(self) -> Levels:
        return {device: info.pressure_level() for device, info in self.global_memory_info().items()}

    def _on_change(self, level: MemoryPressure) -> None:
        """Some manager's level changed: read all, and report if the picture is a new one."""
        with self._lock:
            levels = self._levels()
            if levels != self._reported:
                self._reported = levels
                self._notifier.push(levels)
        self._notifier.drain()

    def _forget(self, manager: object) -> None:
        """Stop hearing a manager that is registered for no device any more."""
        in_use = any(other is manager for other in self._managers.values())
        if not in_use and isinstance(manager, PressureSource):
            manager.remove_pressure_listener(self._on_change)


def _at_once(answer: Coroutine[Any, Any, Result], device: Device) -> Result:
    """The result of a coroutine that never suspends.  Raises UnsupportedError for one that does."""
    try:
        answer.send(None)
    except StopIteration as stop:
        result: Result = stop.value
        return result
    answer.close()
    raise UnsupportedError(
        f"memory monitor: the manager of {device} suspends in memory_info; a synchronous view needs an answer at once"
    )
