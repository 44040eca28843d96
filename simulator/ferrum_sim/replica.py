"""One replica: the engine's step loop under the virtual clock, a cost model in the executor's place."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Generator
from itertools import pairwise
from typing import Any

import simpy

from ferrum_ref.engine.plan import StepPlan
from ferrum_ref.errors import FerrumError, InternalError
from ferrum_ref.types.ids import RequestId
from ferrum_sim.clock import LateEvent
from ferrum_sim.cost_model.batch import CostModel, StepBatch
from ferrum_sim.engine import Engine, inference_request
from ferrum_sim.metrics.records import FINISHED, REJECTED, RequestRecord, StepLog
from ferrum_sim.stretch import MAX_STEPS, blocks_held, instants


class Replica:
    """Takes requests in between steps, as an engine does, and runs until nobody sends any more.  [SI-RUN-1..5]

    A request that arrives during a step is noticed when that step ends; one that arrives at the very end of a step is
    noticed there and then. Unless `step_by_step`, decode steps that would repeat are taken in one stretch, which ends
    with the first step that ends at or after an arrival.
    """

    def __init__(
        self, env: simpy.Environment, engine: Engine, cost_model: CostModel, *, step_by_step: bool, check: bool
    ) -> None:
        self.steps = StepLog()
        self.num_done = 0
        self._env = env
        self._engine = engine
        self._loop = engine.loop
        self._cost_model = cost_model
        self._step_by_step = step_by_step
        self._check = check
        self._inbox: deque[RequestRecord] = deque()
        self._live: dict[RequestId, RequestRecord] = {}
        self._wake: LateEvent | None = None  # set while idle
        self._in_stretch = False  # set while a stretch may still be cut short
        self._num_generated_tokens = 0
        self._process = env.process(self._run())

    def deliver(self, record: RequestRecord) -> None:
        """A request arrives now. Mutates the inbox and, where the replica idles or stretches, its course."""
        self._inbox.append(record)
        if self._wake is not None:
            self._wake.happen_at(self._env.now)
            self._wake = None
        elif self._in_stretch:
            self._in_stretch = False
            self._process.interrupt()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self._take_in()
            plan = self._loop.plan(self._env.now)
            if plan is None:
                if self._loop.has_work():
                    raise InternalError(f"Replica: {self._loop.num_waiting} requests wait and none can ever run")
                self._wake = LateEvent(self._env)
                yield self._wake
                continue
            times_s = self._step_times(plan)
            self._note_plan(plan)
            used_blocks = self._blocks_held(plan, len(times_s) - 1)
            num_steps = yield from self._pass_time(times_s)
            self._commit(plan, times_s[: num_steps + 1], used_blocks[:num_steps])

    def _take_in(self) -> None:
        """Submit what has arrived; a request the engine refuses is rejected.  [SI-RUN-4]"""
        now_s = self._env.now
        while self._inbox:
            record = self._inbox.popleft()
            record.noticed_s = now_s
            request = record.request
            try:
                request_id = self._loop.submit(
                    inference_request(request), request.prompt_token_ids(), now_s=request.arrival_s
                )
            except InternalError:
                raise
            except FerrumError as error:
                record.status, record.finish_reason = REJECTED, error.kind
                self.num_done += 1
                continue
            self._live[request_id] = record

    def _step_times(self, plan: StepPlan) -> list[float]:
        """The instants between the steps of the plan and of those that repeat it: one more than steps.  [SI-RUN-2]"""
        now_s = self._env.now
        schedule = plan.schedule
        batch = StepBatch.of(
            tuple(plan.scheduled_tokens), tuple(plan.computed_tokens), plan.num_sequences - len(schedule.partial)
        )
        step_s = self._cost_model.step_time_s(batch)
        num_further = 0 if self._step_by_step else self._loop.stretch(plan, now_s)
        if num_further:
            # Nothing can come in before the next event, so steps far beyond it need not be worked out.
            horizon_s = self._env.peek() - now_s
            if horizon_s < num_further * step_s:
                num_further = min(num_further, int(horizon_s / step_s) + 1)
        if num_further == 0:
            return [now_s, now_s + step_s]
        return instants(now_s, self._cost_model.stretch_times_s(batch, min(1 + num_further, MAX_STEPS)))

    def _blocks_held(self, plan: StepPlan, num_steps: int) -> list[int]:
        kv_cache = self._engine.kv_cache
        num_held = kv_cache.num_blocks - kv_cache.num_free_blocks
        if num_steps == 1:
            return [num_held]
        return blocks_held(num_held, plan.computed_tokens, kv_cache.block_size, num_steps)

    def _pass_time(self, times_s: list[float]) -> Generator[simpy.Event, Any, int]:
        """Let the steps happen; how many did. Fewer than planned when a request arrives during all but the last."""
        num_steps = len(times_s) - 1
        self._in_stretch = num_steps > 1
        try:
            yield LateEvent(self._env).happen_at(times_s[-1])
        except simpy.Interrupt:
            num_steps = bisect_left(times_s, self._env.now, lo=1)
            yield LateEvent(self._env).happen_at(times_s[num_steps])
        self._in_stretch = False
        return num_steps

    def _note_plan(self, plan: StepPlan) -> None:
        """Who is computed for the first time, and who lost what had been computed."""
        now_s = self._env.now
        for sequence in plan.schedule.started:
            record = self._live[sequence.request_id]
            record.first_scheduled_s = now_s
            record.num_cached_prompt_tokens = sequence.num_computed_tokens
        for request_id in plan.preempted:
            self._live[request_id].num_preemptions += 1

    def _commit(self, plan: StepPlan, times_s: list[float], used_blocks: list[int]) -> None:
        num_steps = len(used_blocks)
        members = plan.schedule.members
        partial = plan.schedule.partial
        sampled = [self._live[sequence.request_id] for sequence in members]
        for index in reversed(partial):
            del sampled[index]
        self.steps.add_steps(
            times_s,
            used_blocks,
            len(plan.preempted),
            num_sequences=len(members),
            num_new_tokens=plan.num_scheduled_tokens,
            num_sampled=len(sampled),
            num_running=self._loop.num_running,
            num_waiting=self._loop.num_waiting,
        )
        events = self._loop.commit_stretch(plan, num_steps, times_s[-1])
        self._note_tokens(sampled, times_s)
        for request_id, reason in events.finished:
            record = self._live.pop(request_id)
            record.status, record.finish_reason, record.finish_s = FINISHED, reason.value, times_s[-1]
            self.num_done += 1
        self._num_generated_tokens += num_steps * len(sampled)
        if self._check:
            self._check_conservation()

    def _note_tokens(self, sampled: list[RequestRecord], times_s: list[float]) -> None:
        """Every sampled request got a token at the end of each step: times and gaps.  [SI-METRIC-1]"""
        first_end_s, last_end_s, num_steps = times_s[1], times_s[-1], len(times_s) - 1
        further_gaps_s = [end_s - start_s for start_s, end_s in pairwise(times_s[1:])]
        longest_s = max(further_gaps_s, default=0.0)
        first_gaps: dict[float, int] = {}
        for record in sampled:
            gap_s = first_end_s - record.last_token_s
            if gap_s == gap_s:
                first_gaps[gap_s] = first_gaps.get(gap_s, 0) + 1
                if not gap_s <= record.max_itl_s:  # also true of NaN: no gap yet
                    record.max_itl_s = gap_s
            else:
                record.first_token_s = first_end_s
            if further_gaps_s and not longest_s <= record.max_itl_s:
                record.max_itl_s = longest_s
            record.last_token_s = last_end_s
            record.num_generated_tokens += num_steps
        for gap_s, count in first_gaps.items():
            self.steps.add_gap(gap_s, first_end_s, count)
        if further_gaps_s and sampled:
            self.steps.add_gaps(further_gaps_s, times_s[2:], len(sampled))

    def _check_conservation(self) -> None:
        """The engine's own invariants, and that its counts are those of the records.  [SI-LAW-1]"""
        loop = self._loop
        loop.check_invariants()
        counted = (loop.num_waiting + loop.num_running, loop.ledger.num_generated_tokens)
        recorded = (len(self._live), self._num_generated_tokens)
        if counted != recorded:
            raise InternalError(
                f"Replica: step {loop.step_index}: the engine counts {counted[0]} requests and {counted[1]} generated "
                f"tokens, the records {recorded[0]} and {recorded[1]}"
            )
