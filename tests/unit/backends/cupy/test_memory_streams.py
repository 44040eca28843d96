"""Streams, events, and queued copies, with a device that runs them as late as it may."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from ferrum_cupy.host.machine import Host
from ferrum_cupy.memory import CupyMemoryManager
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.memory import (
    EventHandle,
    MemoryHandle,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryTransfer,
    MemoryType,
    StreamHandle,
)
from ferrum_ref.types.devices import Device

CPU = Device.CPU


class Bench:
    """A manager of 8-byte blocks, each filled with its number, and two streams."""

    def __init__(self, num_blocks: int = 6, num_streams: int = 2, max_queued: int = 100) -> None:
        self.machine = Host("no compiler")
        pools = {MemoryType.General: MemoryPoolConfig(1024, alignment=8)}
        config = MemoryManagerConfig(pools, enable_debug=True, max_concurrent_transfers=max_queued)
        self.manager = CupyMemoryManager(self.machine, 1024, config)
        self.streams = self.manager.streams
        self.a, self.b, *_ = self.handles = [self.streams.create_stream_now(CPU) for _ in range(num_streams)]
        self.blocks = [self.manager.allocate_now(8, CPU) for _ in range(num_blocks)]
        for number, block in enumerate(self.blocks):
            self.manager.fill(block, number)

    def copy(self, stream: StreamHandle | None, source: int, target: int) -> None:
        transfer = MemoryTransfer.new(self.blocks[source], self.blocks[target], 8)
        asyncio.run(self.manager.copy_async(transfer, stream))

    def values(self) -> list[int]:
        found = [self.manager.read(block) for block in self.blocks]
        assert all(len(set(data)) == 1 for data in found)
        return [data[0] for data in found]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.clause("BK-CUPY-28")
def test_ids_and_streams_that_are_gone(bench: Bench) -> None:
    async def main() -> None:
        streams = bench.streams
        assert (bench.a, bench.b) == (StreamHandle(1), StreamHandle(2))
        bench.machine.queue.run_all()
        await streams.destroy_stream(bench.b)
        assert await streams.create_stream(CPU) == StreamHandle(3)
        event = await streams.record_event(bench.a)
        for call in (
            streams.destroy_stream(bench.b),
            streams.synchronize_stream(bench.b),
            streams.is_stream_ready(bench.b),
            streams.record_event(bench.b),
            streams.wait_event(bench.b, event),
            bench.manager.copy_async(MemoryTransfer.new(bench.blocks[0], bench.blocks[1], 1), bench.b),
        ):
            with pytest.raises(NotFoundError, match="stream 2"):
                await call
        for never in (EventHandle(0), EventHandle(2)):
            with pytest.raises(NotFoundError, match="never recorded"):
                await streams.wait_event(bench.a, never)
        with pytest.raises(InvalidParameterError, match="default stream"):
            await streams.destroy_stream(streams.default_stream(CPU))
        with pytest.raises(UnsupportedError, match="no device cuda:0"):
            await streams.create_stream(Device.CUDA(0))

    asyncio.run(main())


@pytest.mark.clause("BK-CUPY-27", "BK-CUPY-28")
def test_a_stream_runs_in_order_when_somebody_waits(bench: Bench) -> None:
    bench.copy(bench.a, 1, 0)
    bench.copy(bench.a, 2, 1)
    assert bench.values() == [0, 1, 2, 3, 4, 5]  # the host runs them as late as it may
    bench.streams.synchronize_now(bench.a)
    assert bench.values() == [1, 2, 2, 3, 4, 5]
    bench.copy(bench.b, 5, 4)
    bench.streams.destroy_stream_now(bench.b)
    assert bench.values()[4] == 5


@pytest.mark.clause("BK-CUPY-27", "BK-CUPY-28")
def test_the_default_stream_is_done_on_return(bench: Bench) -> None:
    for stream, target in ((None, 0), (StreamHandle.default(), 1)):
        bench.copy(stream, 5, target)
        assert bench.values()[target] == 5
    assert bench.streams.is_ready_now(StreamHandle.default())
    bench.streams.synchronize_now(StreamHandle.default())
    bench.copy(bench.a, 4, 3)
    bench.streams.wait_event_now(StreamHandle.default(), bench.streams.record_event_now(bench.a))
    assert bench.values()[3] == 4
    bench.streams.wait_event_now(bench.a, bench.streams.record_event_now(StreamHandle.default()))
    assert bench.streams.is_ready_now(bench.a)


@pytest.mark.clause("BK-CUPY-28")
def test_polling_ends(bench: Bench) -> None:
    bench.copy(bench.b, 0, 1)
    bench.copy(bench.a, 2, 3)
    bench.copy(bench.a, 4, 5)
    assert [bench.streams.is_ready_now(bench.a) for _ in range(4)] == [False, False, True, True]


@pytest.mark.clause("BK-CUPY-28")
@pytest.mark.parametrize("seed", range(12))
def test_an_event_orders_two_streams(seed: int) -> None:
    bench = Bench()
    bench.machine.queue.rng = random.Random(seed)
    bench.copy(bench.a, 1, 0)
    event = bench.streams.record_event_now(bench.a)
    bench.copy(bench.a, 2, 3)
    bench.streams.wait_event_now(bench.b, event)
    bench.copy(bench.b, 0, 5)  # after the first copy, whatever else happens
    bench.streams.synchronize_now(bench.b)
    assert bench.values()[5] == 1


@pytest.mark.clause("BK-CUPY-28")
def test_without_an_event_both_orders_occur() -> None:
    found = set()
    for seed in range(12):
        bench = Bench()
        bench.machine.queue.rng = random.Random(seed)
        bench.copy(bench.a, 1, 0)
        bench.copy(bench.b, 0, 5)
        bench.machine.synchronize()
        found.add(bench.values()[5])
    assert found == {0, 1}


@pytest.mark.clause("BK-CUPY-28")
def test_streams_and_events_of_another_machine(bench: Bench) -> None:
    stream, array = bench.machine.new_stream(), bench.machine.allocate_bytes(8)
    with pytest.raises(BackendError, match="expected an event of the host"):
        stream.wait(object())  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="expected a stream of the host"):
        bench.machine.copy_bytes(array[:4], array[4:], object())  # type: ignore[arg-type]


@pytest.mark.clause("BK-CUPY-27")
def test_freeing_waits_for_queued_copies(bench: Bench) -> None:
    bench.copy(bench.a, 5, 0)
    bench.manager.deallocate_now(bench.blocks[5])
    again = bench.manager.allocate_now(8, CPU)  # the place of the source
    bench.copy(bench.a, 1, 2)
    bench.manager.deallocate_now(bench.blocks[2])
    other = bench.manager.allocate_now(8, CPU)  # the place of the target
    bench.streams.synchronize_now(bench.a)
    assert bench.manager.read(bench.blocks[0]) == bytes([5]) * 8
    assert bench.manager.read(again) == bench.manager.read(other) == bytes(8)


@pytest.mark.clause("BK-CUPY-27")
def test_moving_and_resizing_wait_for_queued_copies(bench: Bench) -> None:
    bench.manager.deallocate_now(bench.blocks[0])
    bench.copy(bench.a, 5, 4)
    bench.manager.defragment_now(CPU)
    bench.streams.synchronize_now(bench.a)
    assert bench.manager.read(bench.blocks[4]) == bytes([5]) * 8
    for size in (2, 100):
        source, target = (bench.manager.allocate_now(50, CPU) for _ in range(2))
        bench.manager.fill(source, 9)
        bench.manager.copy_async_now(MemoryTransfer.new(source, target, 50), bench.a)
        bench.manager.reallocate_now(target, size)
        bench.streams.synchronize_now(bench.a)
        assert bench.manager.read(target) == (bytes([9]) * 50).ljust(size, b"\0")[:size]
        bench.manager.check_invariants()


@pytest.mark.clause("BK-CUPY-27")
def test_borrowing_waits_for_queued_copies(bench: Bench) -> None:
    bench.copy(bench.a, 5, 4)
    with bench.manager.borrow(bench.blocks[4]) as array:
        assert array.tolist() == [5] * 8


@pytest.mark.clause("BK-CUPY-27")
def test_no_more_than_so_many_are_queued() -> None:
    bench = Bench(max_queued=2)
    for source, target in ((0, 1), (2, 3), (4, 5)):
        bench.copy(bench.a, source, target)
    assert bench.values() == [0, 0, 2, 3, 4, 5]
    with pytest.raises(InvalidParameterError, match="range"):
        bench.manager.copy_async_now(MemoryTransfer.new(bench.blocks[0], bench.blocks[1], 9), bench.a)
    with pytest.raises(NotFoundError):
        bench.manager.copy_async_now(MemoryTransfer.new(MemoryHandle(0), bench.blocks[1], 1), bench.a)


def run(program: Sequence[tuple[int, int, int]], seed: int, is_ordered: bool) -> tuple[list[int], list[int]]:
    """What the blocks hold after copies (stream, source, target) ordered by events where they meet; and should."""
    bench = Bench(num_streams=3)
    bench.machine.queue.rng = random.Random(seed)
    expected = bench.values()
    last: dict[int, list[tuple[int, EventHandle]]] = {}
    for index, source, target in program:
        stream = bench.handles[index]
        for block in {source, target}:
            for other, event in last.get(block, []):
                if is_ordered and other != index:
                    bench.streams.wait_event_now(stream, event)
        bench.copy(stream, source, target)
        event = bench.streams.record_event_now(stream)
        for block in {source, target}:
            last.setdefault(block, []).append((index, event))
        expected[target] = expected[source]
    for handle in bench.handles:
        bench.streams.synchronize_now(handle)
    return bench.values(), expected


@pytest.mark.clause("BK-CUPY-28")
@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=15),
    seed=st.integers(0, 2**32),
)
def test_events_make_any_program_deterministic(program: Sequence[tuple[int, int, int]], seed: int) -> None:
    found, expected = run(program, seed, is_ordered=True)
    assert found == expected


@pytest.mark.clause("BK-CUPY-28")
def test_without_events_programs_go_wrong() -> None:
    program = [(0, 1, 0), (1, 0, 2), (2, 2, 3), (0, 3, 4)]
    results = [run(program, seed, is_ordered=False) for seed in range(10)]
    assert any(found != expected for found, expected in results)


@pytest.mark.clause("BK-CUPY-25", "BK-CUPY-27")
def test_joining_regions_waits_for_queued_copies() -> None:
    pools = {MemoryType.General: MemoryPoolConfig(8, growth_increment=8, alignment=8)}
    manager = CupyMemoryManager(Host("no compiler"), 1024, MemoryManagerConfig(pools))
    source, target = (manager.allocate_now(8, CPU) for _ in range(2))  # a region each
    manager.fill(source, 5)
    stream = manager.streams.create_stream_now(CPU)
    manager.copy_async_now(MemoryTransfer.new(source, target, 8), stream)
    assert manager.defragment_now(CPU).blocks_moved == 2
    manager.streams.synchronize_now(stream)
    assert manager.read(target) == bytes([5]) * 8
