"""Many threads on one manager, one monitor, one set of streams."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import ResourceExhaustedError
from ferrum_ref.interfaces.memory import MemoryPressure, MemoryTransfer
from ferrum_ref.numpy_backend.memory import NumpyGlobalMemoryMonitor
from ferrum_ref.types.devices import Device

CPU = Device.CPU


def together(num_threads: int, work: Callable[[int], None]) -> None:
    """Run work(0), work(1), … at once; re-raise what any of them raised."""
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001  raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]


@pytest.fixture(autouse=True)
def hectic() -> Iterator[None]:
    """Threads take turns as often as possible."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.clause("ME-THREAD-1", "ME-PRESSURE-6")
def test_accounts_agree_at_every_moment(small: Any) -> None:
    manager = small(4096)
    monitor = NumpyGlobalMemoryMonitor()
    heard: list[MemoryPressure] = []
    manager.set_pressure_callback(heard.append)

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        handles: list[Any] = []
        for step in range(150):
            if handles and rng.random() < 0.5:
                handle, size = handles.pop(int(rng.integers(len(handles))))
                assert manager.read(handle) == bytes([index + 1]) * size
                manager.deallocate_now(handle)
            else:
                size = int(rng.integers(1, 300))
                try:
                    handle = manager.allocate_now(size, CPU)
                except ResourceExhaustedError:
                    continue
                assert manager.read(handle) == bytes(size)
                manager.fill(handle, index + 1)
                handles.append((handle, size))
            if step % 20 == index:
                manager.defragment_now(CPU)
                monitor.register_manager(CPU, manager)
            info = manager.memory_info_now(CPU)
            assert info.used_bytes + info.free_bytes + info.reserved_bytes == info.total_bytes
        for handle, _ in handles:
            manager.deallocate_now(handle)

    together(4, work)
    manager.check_invariants()
    assert manager.memory_info_now(CPU).used_bytes == 0
    assert all(a is not b for a, b in zip([MemoryPressure.Low, *heard], heard))
    assert heard[-1] is MemoryPressure.Low


@pytest.mark.clause("ME-THREAD-1")
def test_streams_of_many_threads(small: Any) -> None:
    manager = small(4096)
    source = manager.allocate_now(16, CPU)
    manager.fill(source, 5)

    def work(index: int) -> None:
        target = manager.allocate_now(16, CPU)
        for _ in range(30):
            stream = manager.streams.create_stream_now(CPU)
            manager._transfers.queue(MemoryTransfer.new(source, target, 16), stream)
            manager.streams.synchronize_now(stream)
            assert manager.read(target) == b"\5" * 16
            manager.fill(target, 0)
            manager.streams.destroy_stream_now(stream)

    together(4, work)
    manager.check_invariants()


@pytest.mark.clause("ME-THREAD-1", "ME-STREAM-3")
def test_threads_share_a_stream(small: Any) -> None:
    """Every piece of work runs exactly once, and each thread's pieces in its order."""
    streams = small().streams
    stream = streams.create_stream_now(CPU)
    ran: list[tuple[int, int]] = []

    def work(index: int) -> None:
        for step in range(60):
            streams.submit(stream, lambda step=step: ran.append((index, step)))
            if step % 4 == index:
                streams.synchronize_now(stream)
            else:
                streams.is_ready_now(stream)

    together(4, work)
    streams.synchronize_now(stream)
    assert len(ran) == 240
    assert [[step for who, step in ran if who == index] for index in range(4)] == [list(range(60))] * 4
