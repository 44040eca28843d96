"""The factory, and the monitor over several managers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ferrum_ref.errors import NotFoundError, UnsupportedError
from ferrum_ref.interfaces.memory import (
    AdvancedMemoryManager,
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
from ferrum_ref.numpy_backend.memory import NumpyGlobalMemoryMonitor, NumpyMemoryManager, NumpyMemoryManagerFactory
from ferrum_ref.types.devices import Device

CPU, A, B = Device.CPU, Device.CUDA(0), Device.CUDA(1)
Low, Medium, High, Critical = MemoryPressure
CONFIG = MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(alignment=1)})


def managers() -> tuple[NumpyMemoryManager, NumpyMemoryManager]:
    return NumpyMemoryManager(A, 100, CONFIG), NumpyMemoryManager(B, 200, CONFIG)


@pytest.mark.clause("ME-MONITOR-1")
def test_registration() -> None:
    monitor, (a, b) = NumpyGlobalMemoryMonitor(), managers()
    assert monitor.global_memory_info() == {}
    monitor.register_manager(B, b)
    monitor.register_manager(A, a)
    infos = monitor.global_memory_info()
    assert [(device, info.total_bytes) for device, info in infos.items()] == [(B, 200), (A, 100)]
    monitor.register_manager(A, NumpyMemoryManager(A, 300))
    assert monitor.global_memory_info()[A].total_bytes == 300
    with pytest.raises(UnsupportedError, match="cpu"):
        monitor.register_manager(CPU, a)
    monitor.unregister_manager(A)
    assert list(monitor.global_memory_info()) == [B]
    with pytest.raises(NotFoundError, match="cuda:0"):
        monitor.unregister_manager(A)


@pytest.mark.clause("ME-MONITOR-2")
def test_the_highest_level_counts() -> None:
    monitor, (a, b) = NumpyGlobalMemoryMonitor(), managers()
    assert monitor.global_memory_pressure() is Low
    monitor.register_manager(A, a)
    monitor.register_manager(B, b)
    a.allocate_now(70, A)
    assert monitor.global_memory_pressure() is Medium
    b.allocate_now(190, B)
    assert monitor.global_memory_pressure() is Critical


@pytest.mark.clause("ME-MONITOR-3", "ME-MONITOR-5", "ME-PRESSURE-5")
def test_the_callback_gets_every_devices_level() -> None:
    monitor, (a, b) = NumpyGlobalMemoryMonitor(), managers()
    own: list[MemoryPressure] = []
    heard: list[dict[Device, MemoryPressure]] = []
    a.set_pressure_callback(own.append)
    monitor.set_global_pressure_callback(heard.append)
    b.allocate_now(170, B)
    monitor.register_manager(A, a)
    monitor.register_manager(B, b)
    assert heard == []
    handle = a.allocate_now(70, A)
    b.allocate_now(1, B)
    assert heard == [{A: Medium, B: High}]
    a.deallocate_now(handle)
    assert heard[1:] == [{A: Low, B: High}]
    monitor.unregister_manager(A)
    a.allocate_now(70, A)
    assert len(heard) == 2
    assert own == [Medium, Low, Medium]


@pytest.mark.clause("ME-MONITOR-3", "ME-MONITOR-1")
def test_a_replaced_manager_is_not_heard() -> None:
    monitor, (a, _) = NumpyGlobalMemoryMonitor(), managers()
    heard: list[dict[Device, MemoryPressure]] = []
    monitor.register_manager(A, a)
    other = NumpyMemoryManager(A, 100, CONFIG, peers={B: 100})
    monitor.register_manager(A, other)
    monitor.register_manager(B, other)
    monitor.set_global_pressure_callback(heard.append)
    a.allocate_now(99, A)
    assert heard == []
    other.allocate_now(99, B)
    assert heard == [{A: Low, B: Critical}]  # one manager of two devices: one call
    monitor.unregister_manager(A)
    other.allocate_now(96, A)
    assert heard[1:] == []  # its level stays Critical


@pytest.mark.clause("ME-MONITOR-3", "ME-THREAD-1")
def test_the_callback_may_use_the_monitor_from_any_thread() -> None:
    monitor, (a, _) = NumpyGlobalMemoryMonitor(), managers()
    monitor.register_manager(A, a)
    seen: list[MemoryPressure] = []

    def callback(levels: dict[Device, MemoryPressure]) -> None:
        other = threading.Thread(target=lambda: seen.append(monitor.global_memory_pressure()))
        other.start()
        other.join(2)  # would still wait if the monitor's lock were held
        assert not other.is_alive()
        seen.append(levels[A])

    monitor.set_global_pressure_callback(callback)
    a.allocate_now(70, A)
    assert seen == [Medium, Medium]


@pytest.mark.clause("ME-MONITOR-3")
def test_a_device_that_is_not_registered_is_not_reported() -> None:
    monitor, manager = NumpyGlobalMemoryMonitor(), NumpyMemoryManager(A, 100, CONFIG, peers={B: 100})
    heard: list[dict[Device, MemoryPressure]] = []
    monitor.register_manager(A, manager)
    monitor.set_global_pressure_callback(heard.append)
    manager.allocate_now(99, B)
    assert heard == []


@pytest.mark.clause("ME-MONITOR-1")
def test_listening_ends_with_the_last_registration() -> None:
    listeners: list[object] = []

    class Watched(NumpyMemoryManager):
        def add_pressure_listener(self, listener: Callable[[MemoryPressure], None]) -> None:
            listeners.append(listener)

        def remove_pressure_listener(self, listener: Callable[[MemoryPressure], None]) -> None:
            listeners.remove(listener)

    monitor, manager = NumpyGlobalMemoryMonitor(), Watched(A, 100, CONFIG, peers={B: 100})
    monitor.register_manager(A, manager)
    assert len(listeners) == 1
    monitor.register_manager(A, NumpyMemoryManager(A, 100, CONFIG))
    assert listeners == []
    monitor.register_manager(B, manager)
    monitor.unregister_manager(B)
    assert listeners == []


@pytest.mark.clause("ME-MONITOR-4")
def test_global_gc() -> None:
    monitor, (a, b) = NumpyGlobalMemoryMonitor(), managers()
    monitor.register_manager(A, a)
    monitor.register_manager(B, b)
    gap, kept = a.allocate_now(30, A), a.allocate_now(10, A)
    a.fill(kept, 4)
    a.deallocate_now(gap)
    stats = asyncio.run(monitor.global_gc())
    assert {device: (one.memory_freed, one.blocks_moved) for device, one in stats.items()} == {A: (30, 1), B: (0, 0)}
    assert a.read(kept) == b"\4" * 10


class ForeignManager(DeviceMemoryManager):
    """Somebody else's manager: no listeners, figures set by hand, suspending if told to."""

    def __init__(self, suspends: bool) -> None:
        self.suspends, self.used = suspends, 0
        self.callback: Callable[[MemoryPressure], None] | None = None

    async def memory_info(self, device: Device) -> MemoryInfo:
        if self.suspends:
            await asyncio.sleep(0)
        return MemoryInfo(100, self.used, 100 - self.used, 0, 0, 0.0, None)

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        self.callback = callback

    async def allocate(self, size: int, device: Device) -> MemoryHandle:
        return MemoryHandle(1)

    async def allocate_aligned(self, size: int, alignment: int, device: Device) -> MemoryHandle:
        return MemoryHandle(1)

    async def deallocate(self, handle: MemoryHandle) -> None: ...

    async def copy(self, src: MemoryHandle, dst: MemoryHandle, size: int, src_offset: int, dst_offset: int) -> None: ...

    async def copy_async(self, transfer: MemoryTransfer, stream: StreamHandle | None) -> None: ...

    def handle_info(self, handle: MemoryHandle) -> MemoryHandleInfo | None:
        return None

    async def configure_pool(self, device: Device, config: MemoryPoolConfig) -> None: ...

    async def defragment(self, device: Device) -> DefragmentationStats:
        return DefragmentationStats(0, 0, 0, 0.0, 0.0)


@pytest.mark.clause("ME-MONITOR-5")
def test_foreign_managers() -> None:
    monitor, manager = NumpyGlobalMemoryMonitor(), ForeignManager(suspends=False)
    heard: list[Any] = []
    monitor.set_global_pressure_callback(heard.append)
    monitor.register_manager(CPU, manager)
    manager.used = 90
    assert manager.callback is not None
    manager.callback(High)
    assert heard == [{CPU: High}]
    with pytest.raises(UnsupportedError, match="suspends"):
        monitor.register_manager(A, ForeignManager(suspends=True))
    assert list(monitor.global_memory_info()) == [CPU]


@pytest.mark.clause("ME-FACTORY-1")
def test_factory_managers() -> None:
    async def main() -> None:
        factory = NumpyMemoryManagerFactory({A: 1000, CPU: 2000})
        plain = await factory.create_memory_manager(A, CONFIG)
        advanced = await factory.create_advanced_memory_manager(A, CONFIG)
        assert isinstance(advanced, AdvancedMemoryManager)
        assert (plain.devices(), advanced.devices()) == ([A], [A, CPU])
        assert (await advanced.memory_info(CPU)).total_bytes == 2000
        await plain.allocate(1000, A)
        assert (await advanced.memory_info(A)).used_bytes == 0
        with pytest.raises(UnsupportedError):
            await plain.allocate(1, CPU)
        for create in (factory.create_memory_manager, factory.create_advanced_memory_manager):
            with pytest.raises(UnsupportedError, match="cuda:1"):
                await create(B, CONFIG)
        with pytest.raises(UnsupportedError, match="cuda:1"):
            await factory.create_stream_manager(B)
        assert (await NumpyMemoryManagerFactory().create_memory_manager(CPU, CONFIG)).devices() == [CPU]

    asyncio.run(main())


@pytest.mark.clause("ME-FACTORY-2")
def test_factory_streams_run_the_managers_copies() -> None:
    async def main() -> None:
        factory = NumpyMemoryManagerFactory({A: 1000, CPU: 2000})
        streams = await factory.create_stream_manager(A)
        manager = await factory.create_memory_manager(A, CONFIG)
        assert await factory.create_stream_manager(A) is streams
        assert await factory.create_stream_manager(CPU) is not streams
        src, dst = await manager.allocate(4, A), await manager.allocate(4, A)
        manager.write(src, b"data")
        stream = await streams.create_stream(A)
        await manager.copy_async(MemoryTransfer.new(src, dst, 4), stream)
        assert manager.read(dst) == bytes(4)
        await streams.synchronize_stream(stream)
        assert manager.read(dst) == b"data"

    asyncio.run(main())
