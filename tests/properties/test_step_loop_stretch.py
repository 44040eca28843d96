"""A stretch of decode steps at once equals the same steps one by one, to the last bit of state and of every plan."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ferrum_ref.engine.plan import StepResult
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.interfaces.step import FILLER_TOKEN_ID
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import Priority, SamplingParams


@dataclass
class Arrival:
    step: int
    prompt: list[int]
    request: InferenceRequest
    stop: frozenset[int]


@dataclass
class Scenario:
    num_blocks: int
    block_size: int
    max_seqs: int
    budget: int
    policy: SchedulingPolicy
    caching: bool
    arrivals: list[Arrival]
    cuts: list[int]

    def loop(self) -> StepLoop:
        cache = PagedKvCacheManager(self.num_blocks, self.block_size, enable_prefix_caching=self.caching)
        scheduler = ContinuousBatchScheduler(SchedulerConfig(policy=self.policy))
        return StepLoop(scheduler, cache, BatchHint.of(self.max_seqs, self.budget))


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    num_blocks = draw(st.integers(4, 24))
    context = num_blocks * size
    head = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
    arrivals = []
    step = 0
    for number in range(draw(st.integers(1, 8))):
        step += draw(st.sampled_from([0, 0, 1, 5, 30]))
        length = draw(st.integers(1, 12))
        prompt = (head + [FILLER_TOKEN_ID] * 40)[:length] if draw(st.booleans()) else [number + 1] * length
        request = InferenceRequest.new("", "m", request_id=RequestId.parse(f"00000000-0000-4000-8000-{number:012d}"))
        request = request.with_sampling_params(SamplingParams(max_tokens=draw(st.integers(1, 60))))
        request = request.with_priority(Priority(draw(st.integers(0, 3))))
        stop = draw(st.sampled_from([frozenset(), frozenset(), frozenset(), frozenset({FILLER_TOKEN_ID})]))
        arrivals.append(Arrival(step, prompt[: context - 1], request, stop))
    return Scenario(
        num_blocks,
        size,
        draw(st.integers(1, 6)),
        draw(st.sampled_from([1, 2, 3, 8, 64])),
        draw(st.sampled_from([SchedulingPolicy.FCFS, SchedulingPolicy.Priority])),
        draw(st.booleans()),
        arrivals,
        draw(st.lists(st.integers(1, 40), max_size=10)),
    )


def step_by_step(scenario: Scenario) -> tuple[dict[int, str], dict[int, object], list[object]]:
    """State digest before every step, the members of every plan, and all events."""
    loop, pending = scenario.loop(), list(scenario.arrivals)
    states: dict[int, str] = {}
    plans: dict[int, object] = {}
    happened: list[object] = []
    step = 0
    while pending or loop.has_work():
        step = loop.step_index if loop.has_work() else max(step, pending[0].step)
        while pending and pending[0].step <= loop.step_index:
            submit(loop, pending.pop(0))
        if not loop.has_work():
            submit(loop, pending.pop(0))
        states[loop.step_index] = loop.state_digest()
        plan = loop.plan(float(loop.step_index))
        assert plan is not None
        plans[loop.step_index] = (plan.digest(), plan.sequences)
        tokens = {member.request_id: FILLER_TOKEN_ID for member in plan.sequences if member.samples}
        events = loop.commit(plan, StepResult(tokens), loop.step_index + 1.0)
        loop.check_invariants()
        happened += [(loop.step_index, "first", i) for i in events.prompts_completed]
        happened += [(loop.step_index, reason, i) for i, reason in events.finished]
    states[loop.step_index] = loop.state_digest()
    return states, plans, happened


def submit(loop: StepLoop, arrival: Arrival) -> None:
    loop.submit(arrival.request, arrival.prompt, now_s=float(loop.step_index), stop_token_ids=arrival.stop)


@pytest.mark.clause("ST-STRETCH-1", "ST-STRETCH-2", "ST-STRETCH-3", "KV-STRETCH-1", "KV-STRETCH-2", "KV-STRETCH-3")
@settings(max_examples=250)
@given(scenarios())
def test_stretches_equal_single_steps(scenario: Scenario) -> None:
    states, plans, happened = step_by_step(scenario)
    loop, pending, cuts = scenario.loop(), list(scenario.arrivals), list(scenario.cuts)
    seen: list[object] = []
    while pending or loop.has_work():
        while pending and pending[0].step <= loop.step_index:
            submit(loop, pending.pop(0))
        if not loop.has_work():
            submit(loop, pending.pop(0))
        start = loop.step_index
        assert loop.state_digest() == states[start]
        plan = loop.plan(float(start))
        assert plan is not None
        assert (plan.digest(), plan.sequences) == plans[start]
        further = full = loop.stretch(plan, float(start))
        if pending:
            further = min(further, pending[0].step - start - 1)
        if cuts:
            further = min(further, cuts.pop())
        for ahead in range(1, further + 1):  # the plans that the stretch stands for
            moved = tuple(m._replace(num_computed_tokens=m.num_computed_tokens + ahead) for m in plan.sequences)
            assert moved == plans[start + ahead][1]
        if further == full and not scenario.caching and not plan.preempted and start + 1 + full in plans:
            moved = tuple(m._replace(num_computed_tokens=m.num_computed_tokens + 1 + full) for m in plan.sequences)
            assert not plan.is_decode or moved != plans[start + 1 + full][1], "the stretch is too short"
        events = loop.commit_stretch(plan, 1 + further, start + 1.0 + further)
        loop.check_invariants()
        assert events.num_steps == 1 + further
        seen += [(start + 1, "first", i) for i in events.prompts_completed]
        seen += [(loop.step_index, reason, i) for i, reason in events.finished]
        if further:
            event("stretch")
        if further and loop.num_waiting:
            event("stretch past a blocked request")
    assert loop.state_digest() == states[loop.step_index]
    assert seen == happened
