"""The contract's scheduler by itself: blocks never run out, each batch counts as executed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import AlreadyExistsError, RequestValidationError, SchedulerError, UnsupportedError
from ferrum_ref.interfaces.scheduler import BatchHint, BatchPlan, ResourceConstraints
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.models import TokenUsage
from ferrum_ref.types.requests import InferenceRequest, InferenceResponse, RequestState
from ferrum_ref.types.sampling import FinishReason, Priority, SamplingParams

FCFS = SchedulerConfig(policy=SchedulingPolicy.FCFS)


class Bench:
    """A scheduler on a hand-set clock, called synchronously."""

    def __init__(self, config: SchedulerConfig = FCFS, max_chunk_tokens: int | None = None) -> None:
        self.now_s = 0.0
        self.scheduler = ContinuousBatchScheduler(config, max_chunk_tokens=max_chunk_tokens, clock=lambda: self.now_s)

    def submit(self, prompt_tokens: int, priority: Priority = Priority.Normal, max_tokens: int = 100) -> RequestId:
        request = InferenceRequest.new("text", "m").with_metadata("ferrum_prompt_tokens", prompt_tokens)
        request = request.with_priority(priority).with_sampling_params(SamplingParams(max_tokens=max_tokens))
        return asyncio.run(self.scheduler.submit(request))

    def next(self, max_tokens: int, max_batch_size: int = 8) -> BatchPlan | None:
        return asyncio.run(self.scheduler.next_batch(BatchHint.of(max_batch_size, max_tokens)))

    def tokens(self, *hint: int) -> list[int]:
        plan = self.next(*hint)
        return [] if plan is None else list(plan.scheduled_tokens.values())

    def complete(self, request_id: RequestId, reason: FinishReason = FinishReason.Length) -> None:
        usage = TokenUsage.new(1, 1)
        at = datetime.now(UTC)
        response = InferenceResponse(request_id, "", [], reason, usage, 0, at, {})
        asyncio.run(self.scheduler.complete(request_id, response))


@pytest.mark.clause("SC-CONTRACT-1")
def test_submission_returns_the_id_and_refuses_what_cannot_run() -> None:
    bench = Bench(SchedulerConfig(policy=SchedulingPolicy.FCFS, max_waiting_requests=2))
    request = InferenceRequest.new("héllo", "m")
    assert asyncio.run(bench.scheduler.submit(request)) == request.id
    with pytest.raises(AlreadyExistsError):
        asyncio.run(bench.scheduler.submit(request))
    for broken in (0, -3, "5", True):
        with pytest.raises(RequestValidationError):
            bench.submit(broken)  # type: ignore[arg-type]
    with pytest.raises(RequestValidationError, match="max_tokens"):
        bench.submit(1, max_tokens=0)
    with pytest.raises(RequestValidationError):
        asyncio.run(bench.scheduler.submit(InferenceRequest.new("", "m")))
    bench.submit(1)
    with pytest.raises(SchedulerError, match="full"):
        bench.submit(1)
    assert bench.tokens(100) == [6, 1]  # "héllo" has 6 UTF-8 bytes


@pytest.mark.clause("SC-CONTRACT-2", "SC-STEP-6", "SC-STEP-3", "SC-PLAN-1")
def test_a_prompt_larger_than_the_budget_runs_in_chunks() -> None:
    bench = Bench()
    assert bench.next(16) is None
    request_id = bench.submit(40, max_tokens=1000)  # upstream's FIFO never starts it
    plans = [bench.next(16) for _ in range(4)]
    assert [list(plan.scheduled_tokens.values()) for plan in plans if plan] == [[16], [16], [8], [1]]
    last = plans[-1]
    assert last is not None
    assert last.max_sequence_length == 41
    assert last.requests[0].tokens_processed == 40
    assert last.requests[0].state is RequestState.Running
    assert last.total_tokens() == 1000
    assert bench.scheduler.request_state(request_id) is RequestState.Running


@pytest.mark.clause("SC-STEP-2", "SC-STEP-3", "SC-STEP-5")
def test_decodes_first_then_chunks_share_one_budget() -> None:
    bench = Bench()
    bench.submit(3)
    assert bench.tokens(8) == [3]
    bench.submit(20)
    assert [bench.tokens(8) for _ in range(4)] == [[1, 7], [1, 7], [1, 6], [1, 1]]
    bench.submit(5)
    assert bench.tokens(8, 2) == [1, 1]  # no slot
    assert bench.tokens(2, 3) == [1, 1]  # no budget
    assert bench.tokens(8, 3) == [1, 1, 5]
    assert bench.tokens(2, 3) == [1, 1]  # the third waits for a budget that reaches it


@pytest.mark.clause("SC-STEP-2", "SC-STEP-6")
def test_a_chunk_limit_leaves_budget_for_others() -> None:
    bench = Bench(max_chunk_tokens=4)
    bench.submit(10)
    bench.submit(3)
    assert [bench.tokens(16) for _ in range(4)] == [[4, 3], [4, 1], [2, 1], [1, 1]]


@pytest.mark.clause("SC-CONTRACT-3")
def test_only_running_requests_complete() -> None:
    bench = Bench()
    first, second, third = bench.submit(1), bench.submit(1), bench.submit(1)
    for wrong in (first, RequestId.new()):
        with pytest.raises(SchedulerError, match="not running"):
            bench.complete(wrong)
    bench.next(100, 3)
    bench.complete(first)
    bench.complete(second, FinishReason.Error)
    bench.complete(third, FinishReason.Cancelled)
    with pytest.raises(SchedulerError):
        bench.complete(first)
    metrics = bench.scheduler.metrics()
    assert (metrics.completed_requests, metrics.failed_requests, metrics.cancelled_requests) == (1, 1, 1)
    assert bench.scheduler.request_state(first) is None
    assert bench.next(100) is None


@pytest.mark.clause("SC-CONTRACT-4", "SC-CONTRACT-7")
def test_cancel_finds_waiting_running_and_preempted_requests() -> None:
    bench = Bench()
    first, second, third = bench.submit(1), bench.submit(1), bench.submit(1)
    bench.next(100, 2)
    asyncio.run(bench.scheduler.preempt(second))
    for request_id in (first, second, third):
        assert asyncio.run(bench.scheduler.cancel(request_id))  # upstream overlooks preempted ones
        assert not asyncio.run(bench.scheduler.cancel(request_id))
    metrics = bench.scheduler.metrics()
    assert (metrics.waiting_requests, metrics.running_requests, metrics.preempted_requests) == (0, 0, 0)
    assert metrics.cancelled_requests == 3


@pytest.mark.clause("SC-CONTRACT-5", "SC-QUEUE-1", "SC-QUEUE-2")
def test_priority_moves_a_request_and_keeps_its_seniority() -> None:
    bench = Bench(SchedulerConfig(policy=SchedulingPolicy.Priority))
    first, second = bench.submit(1), bench.submit(1)

    def position(request_id: RequestId) -> int | None:
        record = bench.scheduler.scheduled_request(request_id)
        return None if record is None else record.queue_position

    assert (position(first), position(second)) == (0, 1)
    asyncio.run(bench.scheduler.update_priority(second, Priority.High))
    assert (position(first), position(second)) == (1, 0)  # upstream: as at submission
    asyncio.run(bench.scheduler.update_priority(second, Priority.Normal))
    asyncio.run(bench.scheduler.update_priority(first, Priority.Low))
    asyncio.run(bench.scheduler.update_priority(first, Priority.Normal))
    assert (position(first), position(second)) == (0, 1)  # upstream: seniority lost
    assert position(RequestId.new()) is None
    with pytest.raises(SchedulerError, match="no live request"):
        asyncio.run(bench.scheduler.update_priority(RequestId.new(), Priority.High))
    asyncio.run(bench.scheduler.update_priority(second, Priority.Critical))
    plan = bench.next(1)
    assert plan is not None
    assert plan.max_priority() is Priority.Critical
    assert plan.requests[0].request.id == second


@pytest.mark.clause("SC-CONTRACT-6")
def test_metrics_separate_waiting_from_execution() -> None:
    bench = Bench(SchedulerConfig(policy=SchedulingPolicy.FCFS, max_waiting_requests=4))
    assert bench.scheduler.metrics().throughput_rps == 0.0
    bench.now_s = 10.0
    first = bench.submit(1)
    bench.submit(1)
    assert bench.scheduler.metrics().queue_utilization == 0.5
    bench.now_s = 12.0
    bench.next(1)
    bench.now_s = 15.0
    bench.complete(first)
    metrics = bench.scheduler.metrics()
    assert metrics.avg_wait_time_ms == 2000.0  # upstream: 5000, execution included
    assert metrics.avg_execution_time_ms == 3000.0
    assert metrics.throughput_rps == 1 / 5
    assert (metrics.waiting_requests, metrics.running_requests) == (1, 0)


@pytest.mark.clause("SC-CONTRACT-7", "SC-CONTRACT-6")
def test_a_preempted_request_waits_for_resume_and_recomputes() -> None:
    bench = Bench()
    first, second = bench.submit(4), bench.submit(1)
    bench.next(100)
    bench.next(100)
    result = asyncio.run(bench.scheduler.preempt(first))
    assert result.success
    assert result.saved_state is not None
    assert (result.saved_state.kv_cache_checkpoint, result.saved_state.tokens_processed) == (b"", 4)
    assert bench.scheduler.request_state(first) is RequestState.Preempted
    assert bench.scheduler.metrics().preempted_requests == 1
    with pytest.raises(SchedulerError):
        asyncio.run(bench.scheduler.preempt(first))
    assert bench.tokens(100) == [1]
    asyncio.run(bench.scheduler.resume(first))
    with pytest.raises(SchedulerError):
        asyncio.run(bench.scheduler.resume(second))
    plan = bench.next(100)
    assert plan is not None
    assert plan.scheduled_tokens == {second: 1, first: 5}  # four of the prompt and the generated one
    assert bench.scheduler.metrics().preempted_requests == 0  # upstream's figure never falls


@pytest.mark.clause("SC-CONTRACT-8")
def test_a_step_loop_owns_its_scheduler() -> None:
    bench = Bench()
    StepLoop(bench.scheduler, PagedKvCacheManager(4), BatchHint.simple(1))
    somebody = RequestId.new()
    for call in (
        lambda: bench.submit(1),
        lambda: bench.next(1),
        lambda: bench.complete(somebody),
        lambda: asyncio.run(bench.scheduler.cancel(somebody)),
        lambda: asyncio.run(bench.scheduler.update_priority(somebody, Priority.Low)),
        lambda: asyncio.run(bench.scheduler.preempt(somebody)),
        lambda: asyncio.run(bench.scheduler.resume(somebody)),
    ):
        with pytest.raises(SchedulerError, match="step loop"):
            call()
    used = Bench()
    used.submit(1)
    with pytest.raises(SchedulerError, match="already in use"):
        StepLoop(used.scheduler, PagedKvCacheManager(4), BatchHint.simple(1))


@pytest.mark.clause("SC-HINT-1", "SC-POLICY-3")
def test_what_is_not_implemented_is_refused() -> None:
    bench = Bench()
    for hint in (BatchHint.of(0, 5), BatchHint.of(5, 0)):
        with pytest.raises(SchedulerError):
            asyncio.run(bench.scheduler.next_batch(hint))
    nothing = ResourceConstraints()
    for hint in (
        BatchHint(1, 1, 5, None, nothing),
        BatchHint(1, 1, None, 5, nothing),
        BatchHint(1, 1, None, None, ResourceConstraints(max_compute_units=1)),
    ):
        with pytest.raises(UnsupportedError):
            asyncio.run(bench.scheduler.next_batch(hint))
    for config in (
        SchedulerConfig(enable_preemption=False),
        SchedulerConfig(enable_load_balancing=True),
        SchedulerConfig(enable_sla_enforcement=True),
        SchedulerConfig(fair_share_weights={"a": 1.0}),
        SchedulerConfig(policy=SchedulingPolicy.SJF),
    ):
        with pytest.raises(UnsupportedError):
            ContinuousBatchScheduler(config)
    with pytest.raises(SchedulerError):
        ContinuousBatchScheduler(max_chunk_tokens=0)
    assert bench.scheduler.config() is FCFS


class LastFirst:
    """The latest arrival is served first, the earliest preempted first."""

    name = "last_first"

    def key(self, sequence: SequenceState) -> tuple[int, ...]:
        return (-sequence.arrival_number,)


@pytest.mark.clause("SC-POLICY-4")
def test_a_policy_of_ones_own_decides_admission_and_victim() -> None:
    scheduler = ContinuousBatchScheduler(FCFS, policy=LastFirst())
    assert scheduler.policy.name == "last_first"
    loop = StepLoop(scheduler, PagedKvCacheManager(2, 4), BatchHint.of(2, 64))
    ids = []
    for number in range(3):
        request = InferenceRequest.new("", "m").with_sampling_params(SamplingParams(max_tokens=3))
        ids.append(loop.submit(request, [number] * 4, now_s=0.0))
    plan = loop.plan(0.0)
    assert plan is not None
    assert [member.request_id for member in plan.sequences] == [ids[2], ids[1]]
    loop.commit_stretch(plan, 1, 1.0)
    plan = loop.plan(1.0)
    assert plan is not None
    assert plan.preempted == (ids[1],)
