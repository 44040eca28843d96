"""Undoing a step, and what may happen between plan and commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.engine.plan import StepPlan, StepResult
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest, RequestState
from ferrum_ref.types.sampling import FinishReason, Priority, SamplingParams

FCFS, PRIORITY = SchedulingPolicy.FCFS, SchedulingPolicy.Priority


def loop_of(num_blocks: int, size: int, policy: SchedulingPolicy, budget: int = 64, seqs: int = 8) -> StepLoop:
    scheduler = ContinuousBatchScheduler(SchedulerConfig(policy=policy), max_chunk_tokens=None)
    return StepLoop(scheduler, PagedKvCacheManager(num_blocks, size), BatchHint.of(seqs, budget))


def ask(
    loop: StepLoop, number: int, prompt: Sequence[int], max_tokens: int = 9, priority: Priority = Priority.Normal
) -> RequestId:
    request_id = RequestId.parse(f"00000000-0000-4000-8000-{number:012d}")
    request = InferenceRequest.new("", "m", request_id=request_id).with_priority(priority)
    return loop.submit(request.with_sampling_params(SamplingParams(max_tokens=max_tokens)), prompt, now_s=0.0)


def planned(loop: StepLoop) -> StepPlan:
    plan = loop.plan(0.0)
    assert plan is not None
    return plan


def step(loop: StepLoop, token: int = 1) -> None:
    plan = planned(loop)
    loop.commit(plan, StepResult({m.request_id: token for m in plan.sequences if m.samples}), 0.0)


@pytest.mark.clause("ST-LOOP-7")
def test_a_failed_execution_costs_the_evicted_digest() -> None:
    loop = loop_of(2, 4, FCFS)
    ask(loop, 1, [1] * 5, 1)
    step(loop)  # block 0 keeps the digest of [1, 1, 1, 1]
    before = loop.state_digest()
    ask(loop, 2, [2] * 5, 1)
    between = loop.state_digest()
    plan = planned(loop)  # takes both blocks
    loop.abort(plan, contents_intact=True)
    assert loop.state_digest() == between != before
    loop.abort(planned(loop))  # may have written to them
    assert loop.state_digest() != between
    loop.check_invariants()
    loop.cancel(RequestId.parse("00000000-0000-4000-8000-000000000002"), 0.0)
    ask(loop, 3, [1] * 5, 1)
    assert planned(loop).sequences[0].num_computed_tokens == 0  # an intact digest would say 4


@pytest.mark.clause("ST-LOOP-7")
@pytest.mark.parametrize("intact", [True, False])
def test_a_victim_whose_blocks_were_written_stays_preempted(intact: bool) -> None:
    loop = loop_of(2, 4, FCFS)
    first, second = ask(loop, 1, [1] * 4, 2), ask(loop, 2, [2] * 3, 4)
    step(loop)
    plan = planned(loop)  # the first one's second block is the second one's only block
    assert plan.preempted == (second,)
    loop.abort(plan, contents_intact=intact)
    loop.check_invariants()
    expected = RequestState.Running if intact else RequestState.Preempted
    assert loop.request_state(second) is expected
    assert loop.request_state(first) is RequestState.Running
    assert loop.ledger.num_lost_tokens == (0 if intact else 3)
    while loop.has_work():
        step(loop)
        loop.check_invariants()


@pytest.mark.clause("ST-PLAN-1", "SC-STEP-4", "SC-STEP-7")
def test_a_victim_in_the_middle_gives_back_its_chunk() -> None:
    """Four chunked prompts; the last one's chunk costs the second one's, which the step had already scheduled."""
    scheduler = ContinuousBatchScheduler(SchedulerConfig(policy=PRIORITY), max_chunk_tokens=3)
    loop = StepLoop(scheduler, PagedKvCacheManager(11, 2), BatchHint.of(8, 64))
    ids = [ask(loop, number, [number] * 9) for number in range(4)]
    step(loop)
    loop.update_priority(ids[1], Priority.Low)
    before = loop.state_digest()
    plan = planned(loop)
    assert plan.preempted == (ids[1],)
    assert [tuple(member) for member in plan.sequences] == [(ids[n], 3, 3, False) for n in (0, 2, 3)]
    loop.abort(plan, contents_intact=True)
    assert loop.state_digest() == before
    loop.commit(planned(loop), StepResult({}), 0.0)
    loop.check_invariants()


@pytest.mark.clause("ST-LOOP-8")
@pytest.mark.parametrize("land", ["commit", "abort", "stretch"])
@pytest.mark.parametrize("who", ["running", "victim", "waiting"])
def test_cancelling_under_a_step(land: str, who: str) -> None:
    loop = loop_of(2, 4, FCFS)
    running, victim = ask(loop, 1, [1] * 4, 2), ask(loop, 2, [2] * 3, 4)
    waiting = ask(loop, 3, [3] * 3, 4)
    step(loop)
    plan = planned(loop)
    assert plan.preempted == (victim,)
    chosen = {"running": running, "victim": victim, "waiting": waiting}[who]
    assert loop.cancel(chosen, 0.5)
    assert not loop.cancel(chosen, 0.5)
    assert loop.request_state(chosen) is (None if who == "waiting" else RequestState.Cancelled)
    if land == "abort":
        loop.abort(plan, contents_intact=True)
    elif land == "stretch":
        assert loop.stretch(plan, 0.0) == 0
        loop.commit_stretch(plan, 1, 1.0)
    else:
        events = loop.commit(plan, StepResult({running: 5}), 1.0)
        assert [request_id for request_id, _ in events.tokens] == ([] if who == "running" else [running])
    assert loop.request_state(chosen) is None
    loop.check_invariants()
    while loop.has_work():
        step(loop)
        loop.check_invariants()
    assert not loop.cancel(chosen, 9.0)


@pytest.mark.clause("ST-LOOP-8")
def test_every_way_to_end_is_counted() -> None:
    scheduler = ContinuousBatchScheduler(SchedulerConfig(policy=FCFS))
    loop = StepLoop(scheduler, PagedKvCacheManager(8, 4), BatchHint.of(8, 64))
    ids = [ask(loop, n, [n]) for n in range(4)]
    step(loop)
    assert loop.finish(ids[0], FinishReason.Stop, 1.0)
    assert loop.cancel(ids[1], 1.0)
    assert loop.fail(ids[2], BackendError("broke"), 1.0)
    assert not loop.finish(RequestId.new(), FinishReason.Stop, 1.0)
    metrics = scheduler.metrics()
    assert (metrics.completed_requests, metrics.cancelled_requests, metrics.failed_requests) == (1, 1, 1)
    assert scheduler.request_state(ids[3]) is RequestState.Running
    assert loop.request_state(ids[0]) is None


Change = Callable[[StepLoop], None]


@st.composite
def histories(draw: st.DrawFn) -> tuple[Callable[[], StepLoop], list[Change], list[Change]]:
    """A loop, what happens before the plan, and what happens between plan and abort."""
    num_blocks, size = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    policy = draw(st.sampled_from([FCFS, PRIORITY]))
    budget, seqs = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    context = num_blocks * size
    numbers = iter(range(100))

    def submission() -> Change:
        number, length = next(numbers), draw(st.integers(1, 8))
        if draw(st.booleans()):
            prompt = [draw(st.integers(0, 1))] * length
        else:
            prompt = [number] * length
        max_tokens, priority = draw(st.integers(1, 9)), Priority(draw(st.integers(0, 3)))
        return lambda loop: None if length >= context else submit(loop, number, prompt, max_tokens, priority)

    def other() -> Change:
        number, pick = draw(st.integers(0, 8)), draw(st.integers(0, 3))
        request_id = RequestId.parse(f"00000000-0000-4000-8000-{number:012d}")
        if pick == 3:
            return lambda loop: void(loop.cancel(request_id, 3.0))
        return lambda loop: raise_priority(loop, request_id, Priority(pick))

    def any_change() -> Change:
        return submission() if draw(st.booleans()) else other()

    before: list[Change] = [submission(), submission(), submission()]
    for _ in range(draw(st.integers(0, 12))):
        before.append(step_if_any if draw(st.integers(0, 3)) else any_change())
    between = [any_change() for _ in range(draw(st.integers(0, 4)))]
    return (lambda: loop_of(num_blocks, size, policy, budget, seqs)), before, between


def void(_: object) -> None:
    return None


def submit(loop: StepLoop, number: int, prompt: list[int], max_tokens: int, priority: Priority) -> None:
    ask(loop, number, prompt, max_tokens, priority)


def raise_priority(loop: StepLoop, request_id: RequestId, priority: Priority) -> None:
    if loop.request_state(request_id) in (RequestState.Waiting, RequestState.Running, RequestState.Preempted):
        loop.update_priority(request_id, priority)


def step_if_any(loop: StepLoop) -> None:
    if loop.has_work():
        step(loop)


@pytest.mark.clause("ST-LOOP-7", "ST-LOOP-8", "ST-LOOP-9", "ST-LOOP-12", "SC-STEP-7", "KV-STEP-6")
@settings(max_examples=300)
@given(histories())
def test_an_undone_step_leaves_only_what_came_in_between(
    history: tuple[Callable[[], StepLoop], list[Change], list[Change]],
) -> None:
    make, before, between = history
    undone, untouched = make(), make()
    for change in before:
        change(undone)
        change(untouched)
    assert undone.state_digest() == untouched.state_digest()
    plan = undone.plan(2.0)
    for change in between:
        change(undone)
        change(untouched)
    if plan is not None:
        undone.abort(plan, contents_intact=True)
    assert undone.state_digest() == untouched.state_digest()
    undone.check_invariants()
