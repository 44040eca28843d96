"""Pressure callbacks: at every crossing, once, in order, outside the lock."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from ferrum_ref.errors import FerrumError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import MemoryHandle, MemoryPoolConfig, MemoryPressure
from ferrum_ref.types.devices import Device

CPU, CUDA = Device.CPU, Device.CUDA(0)
Low, Medium, High, Critical = MemoryPressure


def percent(small: Any, **arguments: Any) -> Any:
    """A manager of 100 bytes in which n bytes are n percent, and what it reports."""
    manager = small(100, alignment=1, **arguments)
    heard: list[MemoryPressure] = []
    manager.set_pressure_callback(heard.append)
    return manager, heard


@pytest.mark.clause("ME-PRESSURE-1", "ME-PRESSURE-4")
def test_every_crossing_up_and_down(small: Any) -> None:
    manager, heard = percent(small)
    handles = []
    seen = []
    for size in (69, 1, 14, 1, 9, 1, 5):  # 69 70 84 85 94 95 100
        handles.append(manager.allocate_now(size, CPU))
        seen.append(list(heard))
    assert seen == [
        [], [Medium], [Medium], [Medium, High], [Medium, High], [Medium, High, Critical], [Medium, High, Critical],
    ]  # fmt: skip
    heard.clear()
    for handle in reversed(handles[1:]):  # 95 94 85 84 70 69
        manager.deallocate_now(handle)
    assert heard == [High, Medium, Low]


@pytest.mark.clause("ME-PRESSURE-4")
def test_a_jump_is_one_call(small: Any) -> None:
    manager, heard = percent(small)
    handle = manager.allocate_now(96, CPU)
    manager.deallocate_now(handle)
    assert heard == [Critical, Low]


@pytest.mark.clause("ME-PRESSURE-4")
def test_every_operation_that_changes_the_use(small: Any) -> None:
    manager, heard = percent(small, peers={CUDA: 1000})
    handle = manager.allocate_now(10, CPU)
    manager.reallocate_now(handle, 70)
    assert heard.pop() is Medium
    asyncio.run(manager.prefetch(handle, CUDA))
    assert heard.pop() is Low
    asyncio.run(manager.create_mapping(CPU, CUDA, 86))
    assert heard.pop() is High
    asyncio.run(manager.prefetch(handle, CUDA))
    manager.defragment_now(CPU)
    assert heard == []
    manager.configure_pool_now(CUDA, MemoryPoolConfig(70, 70, alignment=1))
    assert heard.pop() is Critical  # the other device is full now: the highest level counts
    assert heard == []


@pytest.mark.clause("ME-PRESSURE-4")
def test_failures_and_installing_make_no_call(small: Any) -> None:
    manager, heard = percent(small)
    manager.allocate_now(90, CPU)
    heard.clear()
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(11, CPU)
    with pytest.raises(FerrumError):
        manager.deallocate_now(MemoryHandle(99))
    other: list[MemoryPressure] = []
    manager.set_pressure_callback(other.append)
    manager.allocate_now(1, CPU)
    assert heard == other == []


@pytest.mark.clause("ME-PRESSURE-2")
def test_a_fresh_manager_is_low(small: Any) -> None:
    """Upstream's paged manager calls an empty pool Critical, because nothing has been recycled yet."""
    manager, heard = percent(small, pool={"initial_size": 0, "growth_increment": 10})
    assert manager.memory_info_now(CPU).pressure_level() is Low
    manager.allocate_now(10, CPU)  # all that is committed, a tenth of the capacity
    assert manager.memory_info_now(CPU).free_bytes == 90
    assert heard == []


@pytest.mark.clause("ME-PRESSURE-5")
def test_one_callback_and_any_number_of_listeners(small: Any) -> None:
    manager, first = percent(small)
    second: list[MemoryPressure] = []
    beside: list[MemoryPressure] = []
    listener = beside.append
    manager.add_pressure_listener(listener)
    manager.add_pressure_listener(listener)
    manager.set_pressure_callback(second.append)
    handle = manager.allocate_now(70, CPU)
    assert (first, second, beside) == ([], [Medium], [Medium])
    manager.remove_pressure_listener(listener)
    manager.deallocate_now(handle)
    assert (second, beside) == ([Medium, Low], [Medium])


@pytest.mark.clause("ME-PRESSURE-6")
def test_called_in_the_allocating_thread_outside_the_lock(small: Any) -> None:
    manager, _ = percent(small)
    threads: list[int] = []
    used: list[int] = []

    def callback(level: MemoryPressure) -> None:
        threads.append(threading.get_ident())
        other = threading.Thread(target=lambda: used.append(manager.memory_info_now(CPU).used_bytes))
        other.start()
        other.join(2)  # would still wait if the manager's lock were held

    manager.set_pressure_callback(callback)
    manager.allocate_now(70, CPU)
    assert (threads, used) == ([threading.get_ident()], [70])


@pytest.mark.clause("ME-PRESSURE-6")
def test_changes_inside_a_callback_come_after_it(small: Any) -> None:
    manager, _ = percent(small)
    heard: list[tuple[str, MemoryPressure]] = []
    handles = [manager.allocate_now(20, CPU) for _ in range(2)]

    def callback(level: MemoryPressure) -> None:
        heard.append(("enter", level))
        if level is Critical:
            for handle in handles:
                manager.deallocate_now(handle)  # makes room, as a cache would
        heard.append(("leave", level))

    manager.set_pressure_callback(callback)
    manager.allocate_now(55, CPU)
    levels = (Critical, Medium, Low)
    assert heard == [(step, level) for level in levels for step in ("enter", "leave")]


@pytest.mark.clause("ME-PRESSURE-7")
def test_a_raising_callback_harms_nothing(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    manager, _ = percent(small)
    beside: list[MemoryPressure] = []
    manager.set_pressure_callback(lambda level: 1 // 0)
    manager.add_pressure_listener(beside.append)
    with caplog.at_level(logging.ERROR):
        handle = manager.allocate_now(70, CPU)
    assert "ZeroDivisionError" in caplog.text
    assert manager.read(handle) == bytes(70)
    manager.deallocate_now(handle)
    assert beside == [Medium, Low]


@pytest.mark.clause("ME-PRESSURE-6")
def test_an_interrupt_in_a_callback_does_not_silence_later_ones(small: Any) -> None:
    manager, _ = percent(small)
    heard: list[MemoryPressure] = []

    def callback(level: MemoryPressure) -> None:
        heard.append(level)
        if level is Medium:
            raise KeyboardInterrupt

    manager.set_pressure_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        manager.allocate_now(70, CPU)
    manager.allocate_now(20, CPU)
    assert heard == [Medium, High]
