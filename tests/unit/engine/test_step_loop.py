"""The step loop: intake, plans, commits, finish reasons, failures, preemption."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Sequence

import numpy as np
import pytest

from ferrum_ref.engine.plan import StepPlan, StepResult
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    InternalError,
    InvalidParameterError,
    NotFoundError,
    RequestValidationError,
    SchedulerError,
)
from ferrum_ref.interfaces.kv_cache import AllocationRequest
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.kv_cache.handle import KvGeometry
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest, RequestState
from ferrum_ref.types.sampling import FinishReason, Priority, SamplingParams


class Bench:
    """A loop with a small pool; every step takes a second."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        budget: int = 64,
        seqs: int = 8,
        policy: SchedulingPolicy = SchedulingPolicy.FCFS,
        max_context_tokens: int | None = None,
        max_waiting: int = 100,
    ) -> None:
        geometry = KvGeometry(1, 1, 1, DataType.FP16)
        self.cache = PagedKvCacheManager(num_blocks, block_size, geometry=geometry)
        config = SchedulerConfig(policy=policy, max_waiting_requests=max_waiting)
        self.loop = StepLoop(
            ContinuousBatchScheduler(config),
            self.cache,
            BatchHint.of(seqs, budget),
            max_context_tokens=max_context_tokens,
        )
        self.now_s = 0.0

    def submit(
        self,
        prompt: Sequence[int] | np.ndarray,
        max_tokens: int = 10,
        stop: frozenset[int] = frozenset(),
        priority: Priority = Priority.Normal,
    ) -> RequestId:
        request = InferenceRequest.new("", "m").with_sampling_params(SamplingParams(max_tokens=max_tokens))
        return self.loop.submit(request.with_priority(priority), prompt, now_s=self.now_s, stop_token_ids=stop)

    def plan(self) -> StepPlan:
        plan = self.loop.plan(self.now_s)
        assert plan is not None
        return plan

    def step(self, token: int = 1) -> StepPlan:
        plan = self.plan()
        self.now_s += 1.0
        tokens = {member.request_id: token for member in plan.sequences if member.samples}
        self.events = self.loop.commit(plan, StepResult(tokens), self.now_s)
        self.loop.check_invariants()
        return plan

    def run(self, token: int = 1) -> dict[RequestId, FinishReason]:
        finished: dict[RequestId, FinishReason] = {}
        while self.loop.has_work():
            self.step(token)
            finished.update(self.events.finished)
        return finished


@pytest.mark.clause("ST-SUBMIT-1", "ST-SEQUENCE-1")
def test_prompt_and_answer_share_the_context() -> None:
    bench = Bench(max_context_tokens=10)
    assert bench.loop.context_limit_tokens == 10
    request_id = bench.submit(range(7), max_tokens=100)
    assert bench.run() == {request_id: FinishReason.Length}
    assert bench.loop.ledger.num_generated_tokens == 3
    assert Bench(4, 4, max_context_tokens=1000).loop.context_limit_tokens == 16


@pytest.mark.clause("ST-SUBMIT-2")
@pytest.mark.parametrize(
    "ids",
    [[1, 2, 2**32 - 1], (1, 2, 2**32 - 1), np.array([1, 2, 2**32 - 1], np.uint32), np.array([1, 2, 2**32 - 1])],
)
def test_prompts_are_copied_from_anything_integer(ids: Sequence[int]) -> None:
    bench = Bench()
    request_id = bench.submit(ids)
    if not isinstance(ids, tuple):
        ids[0] = 9  # type: ignore[index]
    assert bench.loop.tokens_of(request_id) == [1, 2, 2**32 - 1]
    assert bench.loop.tokens_of(request_id, 1, 2) == [2]


@pytest.mark.clause("ST-SUBMIT-2", "ST-SUBMIT-3", "ST-SUBMIT-4")
@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "no tokens"),
        ([-1], r"got -1"),
        ([3, 2**32], r"got 4294967296"),
        ([2**64 - 1], "token ids"),
        ([1.5], "integers"),
        (["a"], "integers"),
        ([[1, 2]], "2-d"),
        ([1] * 64, "at most 63"),
    ],
)
def test_impossible_prompts_leave_no_trace(ids: list[int], says: str) -> None:
    bench = Bench()
    before = bench.loop.state_digest()
    with pytest.raises(RequestValidationError, match=says):
        bench.submit(ids)
    with pytest.raises(RequestValidationError, match="max_tokens"):
        bench.submit([1], max_tokens=0)
    assert bench.loop.state_digest() == before
    bench.submit([1] * 63)
    assert len(bench.run()) == 1


@pytest.mark.clause("ST-SUBMIT-4", "SC-STEP-1")
def test_ids_are_unique_while_live_and_the_queue_is_bounded() -> None:
    bench = Bench(max_waiting=2)
    request = InferenceRequest.new("", "m").with_sampling_params(SamplingParams(max_tokens=1))
    bench.loop.submit(request, [1], now_s=0.0)
    with pytest.raises(AlreadyExistsError):
        bench.loop.submit(request, [1], now_s=0.0)
    bench.submit([1])
    before = bench.loop.state_digest()
    with pytest.raises(SchedulerError, match="full"):
        bench.submit([1])
    assert bench.loop.state_digest() == before
    assert bench.loop.num_waiting == 2
    bench.run()
    bench.loop.submit(request, [1], now_s=0.0)


@pytest.mark.clause("ST-PLAN-1", "ST-SEQUENCE-2", "ST-LOOP-3", "SC-STEP-3")
def test_chunks_and_decodes_are_one_mechanism() -> None:
    bench = Bench(budget=8)
    first = bench.submit(range(3))
    second = bench.submit(range(50, 70))
    assert [tuple(member) for member in bench.step().sequences] == [(first, 0, 3, True), (second, 0, 5, False)]
    assert bench.events.prompts_completed == [first]
    assert bench.loop.handle_of(second).num_tokens() == 5
    shares = [[tuple(member)[1:] for member in bench.step().sequences] for _ in range(4)]
    assert shares == [
        [(3, 1, True), (5, 7, False)],
        [(4, 1, True), (12, 7, False)],
        [(5, 1, True), (19, 1, True)],
        [(6, 1, True), (20, 1, True)],
    ]
    assert bench.loop.num_generated_of(second) == 2
    assert bench.loop.num_generated_of(first) == 5


@pytest.mark.clause("ST-PLAN-2", "ST-LOOP-12")
def test_digests_depend_on_the_plan_alone() -> None:
    program = (
        "import uuid; from ferrum_ref.engine.step_loop import StepLoop;"
        "from ferrum_ref.interfaces.scheduler import BatchHint;"
        "from ferrum_ref.kv_cache.manager import PagedKvCacheManager;"
        "from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler;"
        "from ferrum_ref.types.ids import RequestId; from ferrum_ref.types.requests import InferenceRequest as R;"
        "loop = StepLoop(ContinuousBatchScheduler(), PagedKvCacheManager(8, 4), BatchHint.of(4, 6));"
        "[loop.submit(R.new('', 'm', request_id=RequestId(uuid.UUID(int=n))), range(5), now_s=0.0) for n in range(3)];"
        "plan = loop.plan(0.0); print(plan.digest()); loop.commit_stretch(plan, 1, 1.0); print(loop.state_digest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(runs) == 1
    bench = Bench(8, 4, budget=6)
    for number in range(3):
        request = InferenceRequest.new("", "m", request_id=RequestId(uuid.UUID(int=number)))
        bench.loop.submit(request, range(5), now_s=0.0)
    plan = bench.plan()
    assert plan.digest() == runs.pop().split()[0]
    bench.loop.abort(plan)
    bench.submit(range(9), priority=Priority.Critical)
    assert bench.plan().digest() == plan.digest()  # a waiting request that does not fit changes nothing


@pytest.mark.clause("ST-PLAN-3", "SC-PLAN-1")
def test_upstreams_batch_plan_of_a_step() -> None:
    bench = Bench(budget=8)
    first = bench.submit(range(3), max_tokens=7)
    second = bench.submit(range(50, 70), max_tokens=7)
    bench.loop.update_priority(second, Priority.High)
    bench.now_s = 1000.0
    plan = bench.plan()
    batch = plan.batch_plan
    assert batch is plan.batch_plan
    assert batch.scheduled_tokens == {first: 3, second: 5}
    assert batch.num_scheduled_tokens() == plan.num_scheduled_tokens == 8
    assert batch.max_sequence_length == 5
    assert batch.total_tokens() == 14  # the generation budget
    assert batch.max_priority() is Priority.High
    assert batch.batch_id.value == uuid.UUID(hex=plan.digest(), version=4)
    assert batch.created_at.timestamp() == 1000.0
    needs = batch.resource_requirements
    assert (needs.kv_cache_blocks, needs.gpu_memory) == (3, 3 * 4 * 2 * 2)
    member = batch.requests[1]
    assert member.state is RequestState.Running
    assert (member.allocated_resources.kv_cache_blocks, member.queue_position) == ([1, 2], None)
    assert member.submitted_at.timestamp() == 0.0
    assert member.started_at == batch.created_at


@pytest.mark.clause("ST-LOOP-4", "ST-PLAN-4")
def test_stop_ids_end_with_eos_and_stay_in_the_output() -> None:
    bench = Bench()
    stopped = bench.submit([9], max_tokens=1, stop=frozenset({2}))
    limited = bench.submit([8], max_tokens=1, stop=frozenset({3}))
    going = bench.submit([7], max_tokens=3, stop=frozenset({31990}))
    bench.step(2)
    assert bench.events.finished == [(stopped, FinishReason.EOS), (limited, FinishReason.Length)]  # upstream: EOS twice
    assert bench.events.tokens == [(stopped, 2), (limited, 2), (going, 2)]
    assert bench.events.prompts_completed == [stopped, limited, going]
    assert bench.events.num_tokens == 3
    bench.step(31990)
    assert bench.events.finished == [(going, FinishReason.EOS)]
    assert bench.events.prompts_completed == []
    assert not bench.loop.has_work()
    assert bench.cache.num_free_blocks == 16


@pytest.mark.clause("ST-LOOP-1")
def test_one_step_is_in_flight() -> None:
    bench = Bench()
    bench.submit([1])
    plan = bench.plan()
    for call in (
        lambda: bench.loop.plan(0.0),
        bench.loop.check_invariants,
    ):
        with pytest.raises(SchedulerError, match="in flight"):
            call()
    bench.loop.commit_stretch(plan, 1, 1.0)
    for late in (
        lambda: bench.loop.commit(plan, StepResult({}), 1.0),
        lambda: bench.loop.abort(plan),
        lambda: bench.loop.stretch(plan, 1.0),
        lambda: bench.loop.commit_stretch(plan, 1, 1.0),
    ):
        with pytest.raises(SchedulerError, match="not the one in flight"):
            late()
    assert bench.loop.step_index == 1
    assert bench.loop.hint == BatchHint.of(8, 64)


@pytest.mark.clause("ST-LOOP-2")
def test_no_plan_without_work_or_while_foreign_caches_hold_the_pool() -> None:
    bench = Bench(4, 4)
    before = bench.loop.state_digest()
    assert bench.loop.plan(0.0) is None
    assert bench.loop.state_digest() == before
    foreign = AllocationRequest(RequestId.new(), 16, 16, 1, 1, 1, Device.CPU, DataType.FP16, Priority.Normal)
    bench.cache.allocate_now(foreign)
    request_id = bench.submit([1])
    assert bench.loop.plan(0.0) is None
    bench.cache.deallocate_now(foreign.request_id)
    assert bench.run() == {request_id: FinishReason.Length}


@pytest.mark.clause("ST-LOOP-5")
def test_one_failed_member_harms_nobody() -> None:
    bench = Bench()
    prompts = {bench.submit([n] * 5): n for n in (1, 2, 3)}
    good, bad, other = prompts
    plan = bench.plan()
    broke = BackendError("kernel broke")
    events = bench.loop.commit(plan, StepResult({good: 7, other: 8}, {bad: broke}), 1.0)
    assert events.finished == [(bad, FinishReason.Error)]
    assert events.errors == {bad: broke}
    assert events.tokens == [(good, 7), (other, 8)]
    bench.loop.check_invariants()
    retry = bench.submit([2] * 5)
    plan = bench.plan()
    assert {member.request_id: member.num_computed_tokens for member in plan.sequences}[retry] == 0  # not registered
    bench.loop.abort(plan)
    assert bench.run() == dict.fromkeys((good, other, retry), FinishReason.Length)


@pytest.mark.clause("ST-LOOP-6")
def test_what_the_executor_owes() -> None:
    bench = Bench()
    silent, odd, fine = bench.submit([1]), bench.submit([2]), bench.submit([3])
    stranger = RequestId.new()
    plan = bench.plan()
    with pytest.raises(InvalidParameterError, match=str(stranger)):
        bench.loop.commit(plan, StepResult({stranger: 1}), 1.0)
    events = bench.loop.commit(plan, StepResult({odd: -1, fine: 4}), 1.0)
    assert events.finished == [(silent, FinishReason.Error), (odd, FinishReason.Error)]
    assert all(isinstance(error, InternalError) for error in events.errors.values())
    assert events.tokens == [(fine, 4)]


@pytest.mark.clause("ST-LOOP-10", "SC-STEP-4", "KV-HANDLE-5")
def test_preemption_keeps_tokens_and_recomputes_them() -> None:
    bench = Bench(num_blocks=3, block_size=4)
    first, second = bench.submit([1] * 4, 6), bench.submit([2] * 3, 5)
    bench.step(5)
    handle = bench.loop.handle_of(second)
    bench.step(6)
    plan = bench.step(7)  # both cross into a new block, one is left
    assert plan.preempted == (second,)
    assert [member.request_id for member in plan.sequences] == [first]
    assert bench.loop.request_state(second) is RequestState.Preempted
    assert bench.loop.tokens_of(second) == [2, 2, 2, 5, 6]
    assert not handle.is_valid()
    with pytest.raises(NotFoundError, match="waiting"):
        bench.loop.handle_of(second)
    while bench.loop.request_state(first) is not None:
        bench.step(8)
    plan = bench.step(9)
    assert [tuple(member) for member in plan.sequences] == [(second, 0, 5, True)]
    assert bench.events.prompts_completed == []  # nothing is told twice
    assert bench.loop.tokens_of(second) == [2, 2, 2, 5, 6, 9]
    assert bench.loop.ledger.num_lost_tokens == 4
    bench.run()


@pytest.mark.clause("SC-POLICY-2", "SC-STEP-4", "ST-LOOP-9")
def test_the_victim_has_the_lowest_priority_of_the_moment() -> None:
    bench = Bench(num_blocks=4, block_size=2, policy=SchedulingPolicy.Priority)
    low, normal, high = (
        bench.submit([n], 3, priority=p) for n, p in enumerate((Priority.Low, Priority.Normal, Priority.High))
    )
    bench.step()
    bench.loop.update_priority(high, Priority.Low)  # it was admitted first
    bench.loop.update_priority(low, Priority.Critical)
    bench.step()
    plan = bench.step()
    assert plan.preempted == (high,)
    assert {member.request_id for member in plan.sequences} == {low, normal}
    with pytest.raises(SchedulerError):
        bench.loop.update_priority(RequestId.new(), Priority.Low)


@pytest.mark.clause("KV-STEP-1", "ST-LOOP-11")
def test_prefix_hits_count_as_computed() -> None:
    bench = Bench()
    bench.submit(range(20), max_tokens=1)
    bench.step()
    again = bench.submit(range(20), max_tokens=1)
    assert [tuple(member) for member in bench.step().sequences] == [(again, 16, 4, True)]
    ledger = bench.loop.ledger
    assert (ledger.num_computed_tokens, ledger.num_hit_tokens) == (24, 16)


@pytest.mark.clause("ST-LOOP-11")
def test_broken_books_are_noticed() -> None:
    bench = Bench()
    request_id = bench.submit(range(5))
    bench.step()
    bench.cache.pool.ref_counts[0] += 1
    with pytest.raises(InternalError, match="references"):
        bench.loop.check_invariants()
    bench.cache.pool.ref_counts[0] -= 1
    bench.loop.ledger.num_computed_tokens += 1
    with pytest.raises(InternalError, match="do not add up"):
        bench.loop.check_invariants()
    bench.loop.ledger.num_computed_tokens -= 1
    bench.loop._live(request_id, "test").tokens.append(1)
    with pytest.raises(InternalError, match="stored"):
        bench.loop.check_invariants()
