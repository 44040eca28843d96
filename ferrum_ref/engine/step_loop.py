"""The step loop: plan, execute (somebody else), commit. Engine and simulator go round it; they differ in the middle.

    plan   = loop.plan(now_s)                  who runs, how many tokens each, which blocks; None when nothing can run
    result = ...                               a backend runs the model, or a cost model says how long that would take
    events = loop.commit(plan, result, now_s)  tokens appended, requests finished, blocks cached and freed

Synchronous, pure of time, guarded by the cache manager's lock.
Clauses: ST-SUBMIT-1..4, ST-LOOP-1..12, ST-STRETCH-1..4 (specs/step_loop.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.engine.intake import make_sequence
from ferrum_ref.engine.ledger import Ledger, digest_of
from ferrum_ref.engine.plan import StepEvents, StepPlan, StepResult
from ferrum_ref.engine.step_commit import STATE_OF, Outcome, StepCommit, outcomes_of
from ferrum_ref.errors import (
    AlreadyExistsError,
    FerrumError,
    InternalError,
    InvalidParameterError,
    NotFoundError,
    SchedulerError,
)
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.interfaces.step import FILLER_TOKEN_ID, Schedule, SequenceState, StepCache, StepScheduler
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest, RequestState
from ferrum_ref.types.sampling import FinishReason, Priority


class StepLoop(StepCommit):
    """Drives one scheduler and one cache manager, both its own from then on.  [ST-LOOP-1..12]

    At most one step is in flight. submit, cancel, finish, fail and update_priority may come at any time; what ends a
    request that the step in flight touches frees its blocks when that step is committed or aborted.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        kv_cache: StepCache,
        hint: BatchHint,
        *,
        max_context_tokens: int | None = None,
    ) -> None:
        """`hint`: max_batch_size running requests, max_tokens per step; the context is also bounded by the pool.

        Raises SchedulerError when either part is in use, UnsupportedError for limits that are not implemented.
        """
        scheduler.require_usable(hint)
        scheduler.attach()
        kv_cache.attach()
        super().__init__(scheduler, kv_cache, hint)
        pool_tokens = kv_cache.num_blocks * kv_cache.block_size
        self._context_limit_tokens = pool_tokens if max_context_tokens is None else min(pool_tokens, max_context_tokens)

    # Requests.
    def submit(
        self,
        request: InferenceRequest,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.integer],
        *,
        now_s: float,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> RequestId:
        """Queue a request; at most `sampling_params.max_tokens` tokens are generated.  [ST-SUBMIT-1..4]

        Mutates the queue.  Raises RequestValidationError: can never run; AlreadyExistsError: the id is live;
        SchedulerError: queue full.
        """
        with self._cache.lock:
            if request.id in self._sequences:
                raise AlreadyExistsError(f"submit: request {request.id} is live already; use a fresh id")
            sequence = make_sequence(request, prompt_token_ids, stop_token_ids, self._context_limit_tokens, now_s)
            self._scheduler.enqueue(sequence)
            self._sequences[request.id] = sequence
            self._ledger.num_submitted += 1
            self._further_steps = None
            return request.id

    def cancel(self, request_id: RequestId, now_s: float) -> bool:
        """End a request in whatever state; False if unknown or ending already.  [ST-LOOP-8]"""
        return self.finish(request_id, FinishReason.Cancelled, now_s)

    def fail(self, request_id: RequestId, error: FerrumError, now_s: float) -> bool:
        """End one request because of `error`, which is the caller's to report; the others go on.  [ST-LOOP-8]"""
        return self.finish(request_id, FinishReason.Error, now_s)

    def finish(self, request_id: RequestId, reason: FinishReason, now_s: float) -> bool:
        """End a request (a stop string was found); False if unknown or ending already.  [ST-LOOP-8]"""
        with self._cache.lock:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.ending is not None:
                return False
            sequence.ending = reason
            self._further_steps = None
            if self._in_flight is not None and self._touches(sequence):
                self._ending.append((sequence, now_s))
            else:
                self._retire(sequence, reason, now_s)
            return True

    def update_priority(self, request_id: RequestId, priority: Priority) -> None:
        """Change a priority, keeping seniority.  Raises SchedulerError: unknown id.  [ST-LOOP-9; D-73]"""
        with self._cache.lock:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.ending is not None:
                raise SchedulerError(f"update_priority: no live request {request_id}")
            self._scheduler.change_priority(sequence, priority)
            self._further_steps = None

    # Steps.
    def plan(self, now_s: float) -> StepPlan | None:
        """Decide the next step; None when nothing can run.  [ST-LOOP-1..2]

        Mutates running and waiting requests and blocks, which `abort` undoes.  Raises SchedulerError: one is in flight.
        """
        cache, scheduler = self._cache, self._scheduler
        with cache.lock:
            if self._in_flight is not None:
                raise SchedulerError(f"plan: step {self._in_flight.step_index} is in flight; commit or abort it first")
            cache.begin_step(now_s)
            schedule = Schedule()
            try:
                scheduler.fill(schedule, cache, self._hint, now_s)
            except BaseException:
                cache.undo_step()
                scheduler.undo(schedule)
                raise
            if not schedule.members:
                cache.undo_step()
                scheduler.undo(schedule)
                return None
            plan = StepPlan(self._step_index, schedule, now_s, cache.bytes_per_block)
            self._in_flight = plan
            self._further_steps = None
            return plan

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """Apply what an executor made of the plan in flight.  [ST-LOOP-3..6]

        A member with an error, or without the token it should have, is failed alone. Mutates everything.
        Raises SchedulerError: not the plan in flight; InvalidParameterError: a result for a request outside the plan
        (both before any change).
        """
        with self._cache.lock:
            self._require_in_flight(plan, "commit")
            outcomes = outcomes_of(plan, result)
            return self._apply(plan, outcomes, now_s)

    def abort(self, plan: StepPlan, *, contents_intact: bool = False) -> None:
        """Undo the plan in flight because its execution failed.  [ST-LOOP-7]

        The state before `plan` comes back exactly if `contents_intact`. Otherwise the blocks that the step would have
        written count as overwritten: they lose their digests, and a request that lost blocks to them stays preempted.
        Raises SchedulerError: not the plan in flight.
        """
        cache, scheduler = self._cache, self._scheduler
        with cache.lock:
            self._require_in_flight(plan, "abort")
            written = set() if contents_intact else cache.planned_blocks(plan.schedule)
            cache.undo_step()
            scheduler.undo(plan.schedule)
            if written:
                cache.forget_blocks(written)
                for sequence, computed in plan.schedule.preempted:
                    if cache.overwritten(sequence, written):
                        scheduler.preempt_now(sequence, cache)
                        self._ledger.num_lost_tokens += computed
            self._land()

    # Stretches.
    def stretch(self, plan: StepPlan, now_s: float) -> int:
        """How many further steps would come out as the plan in flight if nothing arrived; 0 = none.  [ST-STRETCH-1..2]

        Never too many. They end with a finish, before blocks run out and before a waiting request could be admitted.
        `now_s` is not looked at: nothing here depends on time. Pure.  Raises SchedulerError: not the plan in flight.
        """
        with self._cache.lock:
            self._require_in_flight(plan, "stretch")
            if self._further_steps is None:
                self._further_steps = self._count_further(plan)
            return self._further_steps

    def commit_stretch(self, plan: StepPlan, num_steps: int, now_s: float) -> StepEvents:
        """As `num_steps` commits, with plans in between and FILLER_TOKEN_ID for every sampled token.  [ST-STRETCH-3]

        1 <= num_steps <= 1 + stretch(plan); with 1, any plan will do. `now_s` is the last step's end. Mutates all.
        Raises SchedulerError: not the plan in flight; InvalidParameterError: num_steps out of range, no change.
        """
        with self._cache.lock:
            self._require_in_flight(plan, "commit_stretch")
            if num_steps != 1 and not 1 <= num_steps <= 1 + self.stretch(plan, now_s):
                raise InvalidParameterError(
                    f"commit_stretch: num_steps must be in [1, {1 + self.stretch(plan, now_s)}], got {num_steps}"
                )
            if plan.is_decode and not self._ending:
                return self._apply_decode(plan, num_steps, now_s)
            outcomes: list[Outcome] = [FILLER_TOKEN_ID] * plan.num_sequences
            for index in plan.schedule.partial:
                outcomes[index] = None
            events = self._apply(plan, outcomes, now_s)
            events.tokens.clear()
            return events

    # Questions.
    def tokens_of(self, request_id: RequestId, start: int = 0, stop: int | None = None) -> list[int]:
        """Prompt and generated ids [start, stop) of a live request. Pure.  Raises NotFoundError."""
        return self._live(request_id, "tokens_of").tokens[start:stop].tolist()

    def handle_of(self, request_id: RequestId) -> KvCacheHandle:
        """The cache of a running request. Pure.  Raises NotFoundError: unknown, or waiting without one."""
        handle = self._live(request_id, "handle_of").handle
        if handle is None:
            raise NotFoundError(f"handle_of: request {request_id} is waiting and holds no cache")
        if not isinstance(handle, KvCacheHandle):
            raise InternalError(f"handle_of: {type(handle).__name__} is no KvCacheHandle")
        return handle

    def request_state(self, request_id: RequestId) -> RequestState | None:
        """State of a live request, None for any other. Pure."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        if sequence.ending is not None:
            return STATE_OF.get(sequence.ending, RequestState.Completed)
        return sequence.state

    def num_generated_of(self, request_id: RequestId) -> int:
        """Tokens generated so far for a live request. Pure.  Raises NotFoundError."""
        sequence = self._live(request_id, "num_generated_of")
        return sequence.num_known_tokens - sequence.num_prompt_tokens

    def has_work(self) -> bool:
        """Is any request live. Pure."""
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks, preempted ones included."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return self._scheduler.num_running

    @property
    def step_index(self) -> int:
        """Steps committed."""
        return self._step_index

    @property
    def hint(self) -> BatchHint:
        return self._hint

    @property
    def context_limit_tokens(self) -> int:
        """Prompt and answer together hold at most this many tokens."""
        return self._context_limit_tokens

    @property
    def ledger(self) -> Ledger:
        """Token and request counts, to read."""
        return self._ledger

    def check_invariants(self) -> None:
        """Conservation of requests, tokens and blocks.  Pure.  Raises InternalError on any breach.  [ST-LOOP-11]

        Between steps only: raises SchedulerError while one is in flight.
        """
        with self._cache.lock:
            if self._in_flight is not None:
                raise SchedulerError("check_invariants: a step is in flight; commit or abort it first")
            live = list(self._sequences.values())
            self._ledger.check(live)
            self._scheduler.check_invariants(live)
            self._cache.check_invariants(live)

    def state_digest(self) -> str:
        """Digest of everything that decides future behaviour. Pure.  [ST-LOOP-12]"""
        with self._cache.lock:
            parts = [self._step_index, *self._ledger.state_parts()]
            return digest_of([*parts, *self._scheduler.state_parts(), *self._cache.state_parts()])

    def _live(self, request_id: RequestId, operation: str) -> SequenceState:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise NotFoundError(f"{operation}: no live request {request_id}")
        return sequence
