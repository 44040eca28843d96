"""Streams and events: order, waiting, failure, destruction, interleaving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import FerrumIOError, InternalError, InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.memory import EventHandle, StreamHandle
from ferrum_ref.numpy_backend.memory import NumpyStreamManager
from ferrum_ref.types.devices import Device

CPU = Device.CPU


class Bench:
    """A stream manager, two streams, and a journal of the work that ran."""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self.streams = NumpyStreamManager(rng)
        self.a, self.b = (self.streams.create_stream_now(CPU) for _ in range(2))
        self.ran: list[str] = []

    def work(self, stream: StreamHandle, *names: str) -> None:
        for name in names:
            self.streams.submit(stream, lambda name=name: self.ran.append(name))  # type: ignore[misc]

    def fail(self, stream: StreamHandle, error: Exception) -> None:
        def work() -> None:
            raise error

        self.streams.submit(stream, work)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.clause("ME-STREAM-1")
def test_ids_are_never_reused(bench: Bench) -> None:
    async def main() -> None:
        streams = bench.streams
        assert (bench.a, bench.b) == (StreamHandle(1), StreamHandle(2))
        await streams.destroy_stream(bench.b)
        assert await streams.create_stream(CPU) == StreamHandle(3)
        event = await streams.record_event(bench.a)
        for gone in (bench.b, StreamHandle(9)):
            for call in (
                streams.destroy_stream(gone),
                streams.synchronize_stream(gone),
                streams.is_stream_ready(gone),
                streams.record_event(gone),
                streams.wait_event(gone, event),
            ):
                with pytest.raises(NotFoundError, match=f"stream {gone.value}"):
                    await call
            with pytest.raises(NotFoundError):
                streams.submit(gone, lambda: None)

    asyncio.run(main())


@pytest.mark.clause("ME-STREAM-2")
def test_the_default_stream_is_synchronous(bench: Bench) -> None:
    default = bench.streams.default_stream(CPU)
    assert default == StreamHandle(0) == bench.streams.default_stream(Device.CUDA(3))
    bench.work(bench.a, "a")
    bench.work(default, "now")
    assert bench.ran == ["now"]
    with pytest.raises(FerrumIOError, match="disk"):
        bench.fail(default, OSError("disk"))
    bench.work(default, "again")
    asyncio.run(bench.streams.synchronize_stream(default))
    assert bench.ran == ["now", "again"]
    with pytest.raises(InvalidParameterError, match="default stream"):
        asyncio.run(bench.streams.destroy_stream(default))


@pytest.mark.clause("ME-STREAM-2", "ME-EVENT-2")
def test_the_default_stream_waits_for_an_event_at_once(bench: Bench) -> None:
    bench.work(bench.a, "before")
    event = bench.streams.record_event_now(bench.a)
    bench.work(bench.a, "after")
    bench.streams.wait_event_now(StreamHandle.default(), event)
    assert bench.ran == ["before"]


@pytest.mark.clause("ME-STREAM-3", "ME-STREAM-7")
def test_one_stream_runs_in_order(bench: Bench) -> None:
    bench.work(bench.a, "1", "2", "3")
    assert bench.ran == []
    bench.streams.synchronize_now(bench.a)
    assert bench.ran == ["1", "2", "3"]
    bench.streams.synchronize_now(bench.a)


@pytest.mark.clause("ME-STREAM-4")
def test_polling_ends(bench: Bench) -> None:
    assert asyncio.run(bench.streams.is_stream_ready(bench.a))
    bench.work(bench.a, "1", "2", "3")
    assert [bench.streams.is_ready_now(bench.a) for _ in range(4)] == [False, False, True, True]
    bench.work(bench.b, "4")
    assert bench.streams.is_ready_now(bench.a)  # the other stream's work got on meanwhile
    assert bench.ran == ["1", "2", "3", "4"]


@pytest.mark.clause("ME-STREAM-5")
def test_destroying_finishes_the_work(bench: Bench) -> None:
    bench.work(bench.a, "1", "2")
    bench.streams.destroy_stream_now(bench.a)
    assert bench.ran == ["1", "2"]
    bench.fail(bench.b, NotFoundError("lost"))
    with pytest.raises(NotFoundError, match="lost"):
        bench.streams.destroy_stream_now(bench.b)
    with pytest.raises(NotFoundError, match="destroyed"):
        bench.streams.synchronize_now(bench.b)


@pytest.mark.clause("ME-STREAM-6")
def test_an_error_surfaces_once_and_drops_what_follows(bench: Bench) -> None:
    bench.work(bench.a, "1")
    bench.fail(bench.a, InvalidParameterError("bad copy"))
    bench.work(bench.a, "dropped")
    bench.work(bench.b, "other")
    while not bench.streams.is_ready_now(bench.a):
        bench.work(bench.a, "dropped too")
    with pytest.raises(InvalidParameterError, match="bad copy"):
        bench.streams.synchronize_now(bench.a)
    bench.work(bench.a, "2")
    bench.streams.synchronize_now(bench.a)
    bench.streams.synchronize_now(bench.b)
    assert bench.ran == ["1", "other", "2"]
    bench.fail(bench.a, ValueError("odd"))
    with pytest.raises(InternalError, match="ValueError: odd"):
        bench.streams.synchronize_now(bench.a)


@pytest.mark.clause("ME-STREAM-7")
def test_without_a_generator_the_oldest_runs_first(bench: Bench) -> None:
    for name in ("1", "3"):
        bench.work(bench.a, f"a{name}")
        bench.work(bench.b, f"b{name}")
    bench.work(bench.a, "a5")
    bench.streams.synchronize_now(bench.a)
    assert bench.ran == ["a1", "b1", "a3", "b3", "a5"]


def orders(queue: Callable[[Bench], None], seeds: range) -> set[tuple[str, ...]]:
    """The orders in which the queued work runs, over random interleavings."""
    found = set()
    for seed in seeds:
        bench = Bench(np.random.default_rng(seed))
        queue(bench)
        for stream in (bench.a, bench.b):
            bench.streams.synchronize_now(stream)
        found.add(tuple(bench.ran))
    return found


@pytest.mark.clause("ME-STREAM-7", "ME-STREAM-3")
def test_all_interleavings_and_no_others_occur() -> None:
    def queue(bench: Bench) -> None:
        bench.work(bench.a, "a1", "a2")
        bench.work(bench.b, "b1", "b2")

    expected = {"a1 a2 b1 b2", "a1 b1 a2 b2", "a1 b1 b2 a2", "b1 a1 a2 b2", "b1 a1 b2 a2", "b1 b2 a1 a2"}
    assert {" ".join(order) for order in orders(queue, range(80))} == expected
    assert len(orders(queue, range(5, 6)) | orders(queue, range(5, 6))) == 1


@pytest.mark.clause("ME-EVENT-1", "ME-EVENT-2", "ME-STREAM-7")
def test_an_event_orders_streams() -> None:
    """b2 waits for a1 and not for a2; b1 waits for nothing."""

    def queue(bench: Bench) -> None:
        bench.work(bench.a, "a1")
        event = bench.streams.record_event_now(bench.a)
        bench.work(bench.a, "a2")
        bench.work(bench.b, "b1")
        bench.streams.wait_event_now(bench.b, event)
        bench.work(bench.b, "b2")

    expected = {"a1 a2 b1 b2", "a1 b1 a2 b2", "a1 b1 b2 a2", "b1 a1 a2 b2", "b1 a1 b2 a2"}
    assert {" ".join(order) for order in orders(queue, range(80))} == expected


@pytest.mark.clause("ME-EVENT-1", "ME-EVENT-2")
def test_events_that_are_complete_hold_nothing_up(bench: Bench) -> None:
    idle = bench.streams.record_event_now(bench.a)
    bench.work(bench.a, "a")
    bench.streams.wait_event_now(bench.b, idle)
    bench.work(bench.b, "b")
    done = bench.streams.record_event_now(bench.b)
    bench.streams.synchronize_now(bench.b)
    bench.streams.wait_event_now(bench.b, done)
    assert bench.streams.is_ready_now(bench.b)


@pytest.mark.clause("ME-EVENT-2")
def test_a_wait_on_ones_own_event_and_crossed_waits(bench: Bench) -> None:
    bench.work(bench.a, "a")
    bench.streams.wait_event_now(bench.a, bench.streams.record_event_now(bench.a))
    bench.work(bench.b, "b")
    of_a, of_b = (bench.streams.record_event_now(stream) for stream in (bench.a, bench.b))
    bench.streams.wait_event_now(bench.a, of_b)
    bench.streams.wait_event_now(bench.b, of_a)
    bench.work(bench.a, "a2")
    bench.work(bench.b, "b2")
    bench.streams.synchronize_now(bench.b)
    assert bench.ran == ["a", "b", "a2", "b2"]


@pytest.mark.clause("ME-EVENT-3")
def test_events_that_never_were_and_of_streams_that_are_gone(bench: Bench) -> None:
    for never in (EventHandle(0), EventHandle(1)):
        with pytest.raises(NotFoundError, match="never recorded"):
            asyncio.run(bench.streams.wait_event(bench.a, never))
    bench.work(bench.a, "a")
    event = asyncio.run(bench.streams.record_event(bench.a))
    bench.streams.destroy_stream_now(bench.a)
    bench.streams.wait_event_now(bench.b, event)
    assert bench.streams.is_ready_now(bench.b)


@pytest.mark.clause("ME-EVENT-4")
def test_failure_reaches_those_who_wait(bench: Bench) -> None:
    bench.work(bench.a, "good")
    good = bench.streams.record_event_now(bench.a)
    bench.fail(bench.a, NotFoundError("freed"))
    failed = bench.streams.record_event_now(bench.a)
    bench.streams.wait_event_now(bench.b, good)
    bench.work(bench.b, "b1")
    bench.streams.wait_event_now(bench.b, failed)
    bench.work(bench.b, "never")
    with pytest.raises(NotFoundError, match=r"stream 2 awaited event 2, which failed: freed"):
        bench.streams.synchronize_now(bench.b)
    assert bench.ran == ["good", "b1"]
    with pytest.raises(NotFoundError, match=r"^Not found: freed$"):
        bench.streams.synchronize_now(bench.a)
    bench.streams.wait_event_now(bench.b, failed)  # it stays failed
    with pytest.raises(NotFoundError):
        bench.streams.synchronize_now(bench.b)
    after = bench.streams.record_event_now(bench.a)
    bench.streams.wait_event_now(bench.b, after)
    bench.work(bench.b, "fine")
    bench.streams.synchronize_now(bench.b)
    assert bench.ran[-1] == "fine"


@pytest.mark.clause("ME-STREAM-8")
def test_work_must_not_call_its_manager(bench: Bench) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: bench.streams.synchronize_now(bench.a),
        lambda: bench.streams.submit(bench.b, lambda: None),
        lambda: bench.streams.record_event_now(bench.b),
        lambda: bench.streams.is_ready_now(bench.b),
    ]
    for use in uses:
        bench.streams.submit(bench.a, use)
        with pytest.raises(InvalidParameterError, match="inside a stream's work"):
            bench.streams.synchronize_now(bench.a)
