"""Stretches by example: where they end, and what they cost."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from ferrum_ref.engine.plan import StepPlan
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.interfaces.step import FILLER_TOKEN_ID
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import FinishReason, SamplingParams


def loop_of(num_blocks: int, size: int, seqs: int = 8, budget: int = 64, caching: bool = True) -> StepLoop:
    scheduler = ContinuousBatchScheduler(SchedulerConfig(policy=SchedulingPolicy.FCFS))
    return StepLoop(
        scheduler, PagedKvCacheManager(num_blocks, size, enable_prefix_caching=caching), BatchHint.of(seqs, budget)
    )


def ask(loop: StepLoop, length: int, max_tokens: int, stop: frozenset[int] = frozenset()) -> RequestId:
    request = InferenceRequest.new("", "m").with_sampling_params(SamplingParams(max_tokens=max_tokens))
    return loop.submit(request, [5] * length, now_s=0.0, stop_token_ids=stop)


def planned(loop: StepLoop) -> StepPlan:
    plan = loop.plan(0.0)
    assert plan is not None
    return plan


def decoding(loop: StepLoop) -> StepPlan:
    """The first decode step, prompts being through."""
    while True:
        plan = planned(loop)
        if plan.is_decode:
            return plan
        loop.commit_stretch(plan, 1, 0.0)


@pytest.mark.clause("ST-STRETCH-1", "ST-STRETCH-2")
def test_a_stretch_ends_with_the_first_finish() -> None:
    loop = loop_of(64, 4)
    ask(loop, 3, 50)
    second = ask(loop, 3, 8)
    plan = planned(loop)
    assert not plan.is_decode
    assert loop.stretch(plan, 0.0) == 0
    loop.commit_stretch(plan, 1, 1.0)
    plan = planned(loop)
    assert loop.stretch(plan, 1.0) == 6  # this step and six more give the seven tokens that are left
    events = loop.commit_stretch(plan, 7, 8.0)
    assert events.finished == [(second, FinishReason.Length)]
    assert (events.num_tokens, events.num_steps, events.tokens) == (14, 7, [])
    assert loop.step_index == 8


@pytest.mark.clause("ST-STRETCH-2", "KV-STRETCH-1")
def test_a_stretch_ends_before_the_pool_runs_dry() -> None:
    loop = loop_of(4, 4)
    first, second = ask(loop, 3, 12), ask(loop, 3, 12)
    plan = decoding(loop)
    assert plan.num_sequences == 2
    # Both write position 3 now, cross at the next step into the last two blocks, and fill these in three more.
    assert loop.stretch(plan, 0.0) == 4
    loop.commit_stretch(plan, 5, 0.0)
    plan = planned(loop)
    assert plan.preempted == (second,)
    assert [member.request_id for member in plan.sequences] == [first]


@pytest.mark.clause("ST-STRETCH-2", "KV-STRETCH-3")
def test_a_stretch_passes_a_blocked_request_and_stops_for_one_that_fits() -> None:
    loop = loop_of(8, 4, seqs=2)
    ask(loop, 3, 20)
    plan = decoding(loop)
    ask(loop, 20, 4)
    assert loop.stretch(plan, 0.0) == 0  # it fits the next step
    loop.commit_stretch(plan, 1, 0.0)
    ask(loop, 3, 4)
    plan = decoding(loop)
    assert loop.num_waiting == 1
    assert loop.stretch(plan, 0.0) == 2  # no slot for the third: until the second finishes
    loop = loop_of(4, 4)
    ask(loop, 3, 9)
    decoded = decoding(loop)
    ask(loop, 14, 1)
    assert loop.stretch(decoded, 0.0) == 7  # four blocks needed, never more than three free


@pytest.mark.clause("ST-STRETCH-2")
def test_a_filler_that_is_a_stop_id_ends_in_one_step() -> None:
    loop = loop_of(8, 4)
    request_id = ask(loop, 3, 20, frozenset({FILLER_TOKEN_ID}))
    events = loop.commit_stretch(planned(loop), 1, 1.0)
    assert events.finished == [(request_id, FinishReason.EOS)]
    other = ask(loop, 1, 20, frozenset({FILLER_TOKEN_ID}))
    plan = planned(loop)
    assert plan.is_decode  # a prompt of one token looks like one
    assert loop.stretch(plan, 1.0) == 0
    events = loop.commit_stretch(plan, 1, 1.0)
    assert events.finished == [(other, FinishReason.EOS)]
    assert events.prompts_completed == [other]


@pytest.mark.clause("ST-STRETCH-3")
def test_a_stretch_is_bounded() -> None:
    loop = loop_of(8, 4)
    ask(loop, 3, 9)
    plan = decoding(loop)
    for num_steps in (0, -1, 9):
        with pytest.raises(InvalidParameterError, match=r"\[1, 8\]"):
            loop.commit_stretch(plan, num_steps, 1.0)
    loop.commit_stretch(plan, 8, 1.0)
    assert not loop.has_work()
    loop.check_invariants()


@pytest.mark.clause("ST-STRETCH-4", "KV-STRETCH-2")
@pytest.mark.parametrize("caching", [False, True])
def test_cost_does_not_grow_with_tokens(caching: bool) -> None:
    def lines_of(num_steps: int) -> int:
        loop = loop_of(8, 8192, caching=caching)
        for _ in range(3):
            ask(loop, 3, 8000)
        plan = decoding(loop)
        count = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line" and "ferrum_ref" in frame.f_code.co_filename  # not what a collection may run
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            loop.stretch(plan, 0.0)
            loop.commit_stretch(plan, num_steps, 1.0)
        finally:
            sys.settrace(before)
        return count

    assert lines_of(10) == lines_of(5000)
