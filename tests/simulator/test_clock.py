"""Exact times and the order of things that happen at one time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import simpy
from ferrum_sim.clock import LateEvent, Until
from ferrum_sim.stretch import blocks_held, instants
from hypothesis import example, given
from hypothesis import strategies as st

times = st.floats(0.0, 1e9, allow_subnormal=False)


@pytest.mark.clause("SI-CLOCK-1")
@given(times, times)
@example(1.9086861312389374, 268435458.150657)  # no float64 d gives now + d == at
@example(0.0, 0.0)
def test_events_happen_at_their_time_to_the_last_bit(one: float, other: float) -> None:
    now_s, at_s = min(one, other), max(one, other)
    env = simpy.Environment(now_s)
    env.timeout(Until(at_s))
    env.run()
    assert env.now == at_s
    late = simpy.Environment(now_s)
    LateEvent(late).happen_at(at_s)
    late.run()
    assert (late.now, type(late.now)) == (at_s, float)


@pytest.mark.clause("SI-CLOCK-1")
def test_late_events_come_after_ordinary_ones_of_the_same_time() -> None:
    env = simpy.Environment()
    seen: list[str] = []

    def wait(event: simpy.Event, name: str) -> Generator[simpy.Event, Any, None]:
        yield event
        seen.append(f"{name} at {env.now}")

    env.process(wait(LateEvent(env).happen_at(1.5), "late"))
    env.process(wait(env.timeout(1.5), "ordinary"))
    env.process(wait(LateEvent(env).happen_at(1.0), "earlier late"))
    env.run()
    assert seen == ["earlier late at 1.0", "ordinary at 1.5", "late at 1.5"]


@pytest.mark.clause("SI-RUN-2")
@given(times, st.lists(st.floats(0.0, 10.0), max_size=50))
def test_instants_are_summed_one_by_one(start_s: float, steps_s: list[float]) -> None:
    expected = [start_s]
    for step_s in steps_s:
        expected.append(expected[-1] + step_s)
    assert instants(start_s, np.array(steps_s, dtype=np.float64)) == expected


@pytest.mark.clause("SI-RUN-3")
@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), st.integers(1, 33), st.integers(1, 100))
def test_blocks_held_are_those_the_lengths_need(computed: list[int], block_size: int, num_steps: int) -> None:
    """In step j (from 0) a member holds ceil((computed + j + 1) / block_size) blocks."""
    needed = [sum(-(-(length + step + 1) // block_size) for length in computed) for step in range(num_steps)]
    assert blocks_held(needed[0], computed, block_size, num_steps) == needed
