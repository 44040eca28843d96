"""The step loop under any order of submissions, steps, failures, cancellations: a stateful machine with real contents.

A toy storage keeps one number per slot: the token whose K/V would lie there. The toy executor writes what a plan says
and first checks that everything the plan calls computed is really there, whoever wrote it.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ferrum_ref.engine.plan import StepEvents, StepPlan, StepResult
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import BackendError, RequestValidationError
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import FinishReason, Priority, SamplingParams

GARBAGE = -1
STOP = 7


class StepLoopMachine(RuleBasedStateMachine):
    """Rules: submit, plan, commit (some members failing), stretch, abort, cancel, finish, new priority."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: StepPlan | None = None
        self.before_plan: str | None = None  # state digest, while nothing came in between
        self.live: list[RequestId] = []
        self.arrival: dict[RequestId, int] = {}
        self.generated: dict[RequestId, list[int]] = {}
        self.served: list[int] = []  # arrival numbers in order of first service
        self.now_s = 0.0
        self.priority_changed = False

    @initialize(
        num_blocks=st.integers(2, 9),
        size=st.integers(1, 3),
        max_seqs=st.integers(1, 4),
        budget=st.integers(1, 12),
        caching=st.booleans(),
        fcfs=st.booleans(),
        chunk=st.none() | st.integers(1, 5),
    )
    def start(
        self, num_blocks: int, size: int, max_seqs: int, budget: int, caching: bool, fcfs: bool, chunk: int | None
    ) -> None:
        self.size, self.fcfs = size, fcfs
        self.cache = PagedKvCacheManager(num_blocks, size, enable_prefix_caching=caching)
        self.slots = [[GARBAGE] * size for _ in range(num_blocks)]
        policy = SchedulingPolicy.FCFS if fcfs else SchedulingPolicy.Priority
        self.hint = BatchHint.of(max_seqs, budget)
        self.loop = StepLoop(
            ContinuousBatchScheduler(SchedulerConfig(policy=policy), max_chunk_tokens=chunk), self.cache, self.hint
        )

    @rule(
        text=st.sampled_from([[1] * 9, [1, 1, 2, 1, 2, 2, 3, 3, 3], [2, 3] * 5]),
        length=st.integers(1, 9),
        tail=st.lists(st.integers(1, 3), max_size=2),
        max_tokens=st.integers(1, 16),
        priority=st.sampled_from(list(Priority)),
    )
    def submit(self, text: list[int], length: int, tail: list[int], max_tokens: int, priority: Priority) -> None:
        prompt = text[:length] + tail
        request = InferenceRequest.new("", "m").with_priority(priority)
        request = request.with_sampling_params(SamplingParams(max_tokens=max_tokens))
        fits = len(prompt) < len(self.slots) * self.size
        try:
            self.loop.submit(request, prompt, now_s=self.now_s, stop_token_ids=frozenset({STOP}))
        except RequestValidationError:
            assert not fits
            return
        assert fits
        self.arrival[request.id] = len(self.arrival)
        self.generated[request.id] = []
        self.live.append(request.id)
        self.before_plan = None

    @precondition(lambda self: self.plan is None)
    @rule()
    def make_plan(self) -> None:
        digest = self.loop.state_digest()
        self.plan = self.loop.plan(self.now_s)
        self.before_plan = digest
        if self.plan is None:
            assert not self.loop.has_work(), "work conservation: a live request waits while nothing runs"
            assert self.loop.state_digest() == digest
            return
        self.check_plan(self.plan)

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_scheduled_tokens <= self.hint.max_tokens
        assert plan.num_sequences <= self.hint.max_batch_size
        ids = [member.request_id for member in plan.sequences]
        assert len(set(ids)) == len(ids)
        assert plan.batch_plan.num_scheduled_tokens() == plan.num_scheduled_tokens
        writable: dict[int, RequestId] = {}
        for member in plan.sequences:
            tokens = self.loop.tokens_of(member.request_id)
            end = member.num_computed_tokens + member.num_scheduled_tokens
            assert member.num_scheduled_tokens >= 1
            assert end <= len(tokens)
            assert member.samples == (end == len(tokens))
            blocks = self.loop.handle_of(member.request_id).block_table().physical_blocks
            stored = [self.slots[blocks[i // self.size]][i % self.size] for i in range(member.num_computed_tokens)]
            assert stored == tokens[: member.num_computed_tokens], "a computed position holds another token's K/V"
            for i in range(member.num_computed_tokens, end):
                owner = writable.setdefault(blocks[i // self.size], member.request_id)
                assert owner == member.request_id, "two members write to one block"

    def execute(self, plan: StepPlan, broken: float) -> None:
        """Write the planned positions; with `broken` > 0 stop after that share of them and leave garbage."""
        todo = []
        for member in plan.sequences:
            blocks = self.loop.handle_of(member.request_id).block_table().physical_blocks
            tokens = self.loop.tokens_of(member.request_id)
            for i in range(member.num_computed_tokens, member.num_computed_tokens + member.num_scheduled_tokens):
                todo.append((blocks[i // self.size], i % self.size, tokens[i]))
        for block, offset, token in todo[: int(len(todo) * broken)] if broken else todo:
            self.slots[block][offset] = GARBAGE if broken else token

    @precondition(lambda self: self.plan is not None)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        plan = self.plan
        assert plan is not None
        self.execute(plan, 0.0)
        tokens, errors = {}, {}
        for member in plan.sequences:
            if data.draw(st.integers(0, 19)) == 0:
                errors[member.request_id] = BackendError("toy executor: this one broke")
            elif member.samples:
                tokens[member.request_id] = data.draw(st.sampled_from([1, 1, 1, 2, 3, STOP]))
        self.now_s += 1.0
        events = self.loop.commit(plan, StepResult(tokens, errors), self.now_s)
        for request_id, token in events.tokens:
            assert tokens[request_id] == token
            self.generated[request_id].append(token)
        assert set(events.errors) == {i for i in errors if i in self.live}
        self.landed(plan, events)

    @precondition(lambda self: self.plan is not None)
    @rule(wanted=st.integers(1, 6))
    def commit_stretch(self, wanted: int) -> None:
        plan = self.plan
        assert plan is not None
        num_steps = min(wanted, 1 + self.loop.stretch(plan, self.now_s))
        self.execute(plan, 0.0)
        self.now_s += num_steps
        cancelled = {member.request_id for member in plan.sequences} - set(self.live)
        events = self.loop.commit_stretch(plan, num_steps, self.now_s)
        finished = dict(events.finished)
        for member in plan.sequences:
            if member.samples and member.request_id not in cancelled:
                self.generated[member.request_id] += [0] * num_steps
            if member.request_id in finished or member.request_id in cancelled:
                continue
            blocks = self.loop.handle_of(member.request_id).block_table().physical_blocks
            known = self.loop.tokens_of(member.request_id)
            for i in range(member.num_computed_tokens, len(known) - 1):  # what an executor would have written
                if num_steps > 1:
                    self.slots[blocks[i // self.size]][i % self.size] = known[i]
        if num_steps > 1:
            self.write_finished(plan, num_steps, finished)
        self.landed(plan, events)

    def write_finished(self, plan: StepPlan, num_steps: int, finished: dict[RequestId, FinishReason]) -> None:
        """Blocks of finished requests are findable but no longer anybody's: find them by the digests they keep."""
        if finished:
            for block in range(len(self.slots)):
                if self.cache.pool.index.digest_of(block) is not None and not self.cache.pool.ref_counts[block]:
                    self.cache.forget_blocks([block])

    def landed(self, plan: StepPlan, events: StepEvents) -> None:
        for member in plan.sequences:
            number = self.arrival[member.request_id]
            if number not in self.served:
                self.served.append(number)
        for request_id, reason in events.finished:
            self.live.remove(request_id)
            if reason is FinishReason.EOS:
                assert self.generated[request_id][-1] in (STOP, 0)
        for request_id in self.live:
            if self.loop.request_state(request_id) is not None:
                assert self.loop.num_generated_of(request_id) == len(self.generated[request_id])
        self.plan = None

    @precondition(lambda self: self.plan is not None)
    @rule(broken=st.floats(0.1, 1.0), intact=st.booleans())
    def abort(self, broken: float, intact: bool) -> None:
        plan = self.plan
        assert plan is not None
        if not intact:
            self.execute(plan, broken)
        self.loop.abort(plan, contents_intact=intact)
        if intact and self.before_plan is not None:
            assert self.loop.state_digest() == self.before_plan
        self.plan = None

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.Cancelled, FinishReason.Stop, FinishReason.Error]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        request_id = data.draw(st.sampled_from(self.live))
        assert self.loop.finish(request_id, reason, self.now_s)
        assert not self.loop.cancel(request_id, self.now_s)
        self.live.remove(request_id)
        self.before_plan = None

    @precondition(lambda self: self.live)
    @rule(data=st.data(), priority=st.sampled_from(list(Priority)))
    def change_priority(self, data: st.DataObject, priority: Priority) -> None:
        self.loop.update_priority(data.draw(st.sampled_from(self.live)), priority)
        self.before_plan = None
        self.priority_changed = True

    @invariant()
    def conserved(self) -> None:
        if self.plan is None and hasattr(self, "loop"):
            self.loop.check_invariants()

    @invariant()
    def first_come_first_served(self) -> None:
        if hasattr(self, "loop") and self.fcfs:
            assert self.served == sorted(self.served)

    def teardown(self) -> None:
        """No starvation: everybody finishes, and then every block is free."""
        if not hasattr(self, "loop"):
            return
        if self.plan is not None:
            self.loop.abort(self.plan)
        for _ in range(5000):
            plan = self.loop.plan(self.now_s)
            if plan is None:
                break
            self.check_plan(plan)
            self.execute(plan, 0.0)
            tokens = {member.request_id: 1 for member in plan.sequences if member.samples}
            self.loop.commit(plan, StepResult(tokens), self.now_s)
            self.loop.check_invariants()
        assert not self.loop.has_work()
        assert self.cache.num_free_blocks == len(self.slots)
        assert not any(self.cache.pool.ref_counts)
        ledger = self.loop.ledger
        assert ledger.num_submitted == ledger.num_retired == len(self.arrival)


StepLoopMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStepLoop = pytest.mark.clause(
    "ST-LOOP-1", "ST-LOOP-2", "ST-LOOP-3", "ST-LOOP-4", "ST-LOOP-5", "ST-LOOP-7", "ST-LOOP-8", "ST-LOOP-10",
    "ST-LOOP-11", "ST-LOOP-12", "ST-SUBMIT-3", "KV-STEP-1", "KV-STEP-6", "KV-STEP-7", "KV-POOL-5", "KV-POOL-6",
    "SC-STEP-5", "SC-STEP-7", "SC-STEP-8",
)(StepLoopMachine.TestCase)  # fmt: skip
