"""Random programs over streams and events: every order that occurs respects what must happen before what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import NotFoundError
from ferrum_ref.interfaces.memory import EventHandle, StreamHandle
from ferrum_ref.numpy_backend.memory import NumpyStreamManager
from ferrum_ref.types.devices import Device

NUM_STREAMS = 3
Step = tuple[str, int, int]  # what, stream, number of the event (modulo those recorded)

steps = st.lists(
    st.tuples(
        st.sampled_from(["work", "work", "work", "record", "wait", "fail"]), st.integers(0, 2), st.integers(0, 20)
    ),
    max_size=25,
)


class Program:
    """Runs a program; beside it, what each piece of work must wait for and which pieces a failure forbids."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self.streams = NumpyStreamManager(rng)
        self.handles = [self.streams.create_stream_now(Device.CPU) for _ in range(NUM_STREAMS)]
        self.ran: list[int] = []
        self.before: dict[int, set[int]] = {}  # work -> all work that must have run
        self.forbidden: set[int] = set()
        self.past: list[set[int]] = [set() for _ in range(NUM_STREAMS)]
        self.is_failed = [False] * NUM_STREAMS
        self.events: list[tuple[EventHandle, set[int], bool]] = []

    def queue(self, step: Step) -> None:
        what, index, number = step
        stream = self.handles[index]
        if what == "record":
            event = self.streams.record_event_now(stream)
            self.events.append((event, set(self.past[index]), self.is_failed[index]))
        elif what == "wait" and self.events:
            event, past, is_failed = self.events[number % len(self.events)]
            self.streams.wait_event_now(stream, event)
            if not self.is_failed[index]:
                self.past[index] |= past
                self.is_failed[index] = is_failed
        elif what == "fail" and number == 0:
            self.submit(stream, index, fails=True)
            self.is_failed[index] = True
        elif what == "work":
            self.submit(stream, index, fails=False)

    def submit(self, stream: StreamHandle, index: int, fails: bool) -> None:
        name = len(self.before)
        self.before[name] = set(self.past[index])
        if self.is_failed[index]:
            self.forbidden.add(name)
        else:
            self.past[index].add(name)

        def work() -> None:
            self.ran.append(name)
            if fails:
                raise NotFoundError("on purpose")

        self.streams.submit(stream, work)

    def finish(self) -> None:
        for handle, is_failed in zip(self.handles, self.is_failed):
            if is_failed:
                with pytest.raises(NotFoundError, match="on purpose"):
                    self.streams.synchronize_now(handle)
            self.streams.synchronize_now(handle)


@pytest.mark.clause("ME-STREAM-3", "ME-STREAM-6", "ME-STREAM-7", "ME-EVENT-1", "ME-EVENT-2", "ME-EVENT-4")
@settings(max_examples=200)
@given(program=steps, seed=st.one_of(st.none(), st.integers(0, 2**32)))
def test_every_order_is_a_lawful_one(program: Sequence[Step], seed: int | None) -> None:
    run = Program(None if seed is None else np.random.default_rng(seed))
    for step in program:
        run.queue(step)
    assert run.ran == []
    run.finish()
    assert sorted(run.ran) == sorted(set(run.before) - run.forbidden)
    for position, name in enumerate(run.ran):
        assert run.before[name] <= set(run.ran[:position])
    if seed is None:
        assert run.ran == sorted(run.ran)
