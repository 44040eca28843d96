"""Continuous batching: the contract's `Scheduler` over the synchronous core that the step loop drives.

Two ways to use it, never both: a `StepLoop` attaches and drives the core, with real blocks and tokens; or callers use
the contract, where blocks never run out and `next_batch` takes the batch it returned before as executed.
Clauses: SC-CONTRACT-1..8 (specs/scheduler.md).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from ferrum_ref.errors import AlreadyExistsError, RequestValidationError, SchedulerError
from ferrum_ref.interfaces.scheduler import (
    AllocatedResources,
    BatchHint,
    BatchPlan,
    BatchResourceRequirements,
    PreemptionResult,
    PreemptionState,
    ScheduledRequest,
    Scheduler,
    SchedulerConfig,
    SchedulerMetrics,
)
from ferrum_ref.interfaces.step import Schedule, SequenceState
from ferrum_ref.scheduler.core import StepSchedulerCore
from ferrum_ref.scheduler.policy import QueuePolicy
from ferrum_ref.scheduler.unlimited import UnlimitedCache
from ferrum_ref.types.ids import BatchId, RequestId
from ferrum_ref.types.requests import InferenceRequest, InferenceResponse, RequestState
from ferrum_ref.types.sampling import FinishReason, Priority

PROMPT_TOKENS_KEY = "ferrum_prompt_tokens"  # request metadata: the prompt's length, if the submitter knows it


class ContinuousBatchScheduler(StepSchedulerCore, Scheduler):
    """Iteration-level scheduler.  [SC-CONTRACT-1..8]"""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        policy: QueuePolicy | None = None,
        max_chunk_tokens: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`policy` overrides the one `config` names; `max_chunk_tokens` caps one request's tokens per step.

        `clock` (seconds since 1970) serves the contract's methods only; a step loop passes its own times.
        Raises UnsupportedError for settings that are not implemented.
        """
        super().__init__(config or SchedulerConfig(), policy, max_chunk_tokens)
        self._clock = clock
        self._requests: dict[RequestId, SequenceState] = {}  # the contract's own; a step loop keeps its own
        self._parked: dict[RequestId, SequenceState] = {}
        self._cache = UnlimitedCache()
        self._outstanding = Schedule()

    async def submit(self, request: InferenceRequest) -> RequestId:
        """See `Scheduler.submit`. The prompt's length is metadata "ferrum_prompt_tokens", else its UTF-8 bytes."""
        self._require_undriven("submit")
        if request.id in self._requests:
            raise AlreadyExistsError(f"submit: request {request.id} is live already; use a fresh id")
        length = prompt_length_of(request)
        if request.sampling_params.max_tokens < 1:
            raise RequestValidationError("submit: max_tokens must be >= 1, got 0")
        sequence = SequenceState(request, array("q"), length, 2**63, frozenset(), self._clock())
        self.enqueue(sequence)
        self._requests[request.id] = sequence
        return request.id

    async def next_batch(self, hint: BatchHint) -> BatchPlan | None:
        self._require_undriven("next_batch")
        self.require_usable(hint)
        now_s = self._clock()
        self._take_as_executed()
        schedule = Schedule()
        self.fill(schedule, self._cache, hint, now_s)
        self.applied(schedule)
        self._outstanding = schedule
        return _batch_plan(schedule, now_s) if schedule.members else None

    async def complete(self, request_id: RequestId, response: InferenceResponse) -> None:
        self._require_undriven("complete")
        sequence = self._requests.get(request_id)
        if sequence is None or sequence.state is not RequestState.Running:
            raise SchedulerError(f"complete: request {request_id} is not running")
        ended = {FinishReason.Error: RequestState.Failed, FinishReason.Cancelled: RequestState.Cancelled}
        self._forget(sequence, ended.get(response.finish_reason, RequestState.Completed))

    async def cancel(self, request_id: RequestId) -> bool:
        self._require_undriven("cancel")
        sequence = self._requests.get(request_id)
        if sequence is None:
            return False
        self._forget(sequence, RequestState.Cancelled)
        return True

    async def update_priority(self, request_id: RequestId, priority: Priority) -> None:
        self._require_undriven("update_priority")
        sequence = self._requests.get(request_id)
        if sequence is None:
            raise SchedulerError(f"update_priority: no live request {request_id}")
        self.change_priority(sequence, priority)

    async def preempt(self, request_id: RequestId) -> PreemptionResult:
        """Stop a running request and keep it out of the queue until `resume`; its cache is recomputed then.

        Raises SchedulerError for a request that is not running.
        """
        self._require_undriven("preempt")
        sequence = self._requests.get(request_id)
        if sequence is None or sequence.state is not RequestState.Running:
            raise SchedulerError(f"preempt: request {request_id} is not running")
        computed, generated = sequence.num_computed_tokens, sequence.num_known_tokens - sequence.num_prompt_tokens
        self._drop_from_outstanding(sequence)
        self.preempt_now(sequence, self._cache)
        self._waiting.remove(sequence)
        self._parked[request_id] = sequence
        saved = PreemptionState(b"", computed, {"num_generated_tokens": generated})
        return PreemptionResult(True, saved, AllocatedResources())

    async def resume(self, request_id: RequestId) -> None:
        """Queue a preempted request again, by its seniority.  Raises SchedulerError: not stopped by `preempt`."""
        self._require_undriven("resume")
        sequence = self._parked.pop(request_id, None)
        if sequence is None:
            raise SchedulerError(f"resume: request {request_id} was not stopped by preempt()")
        self._waiting.push(sequence)

    def metrics(self) -> SchedulerMetrics:
        waiting = [*self._waiting, *self._parked.values()]
        num_preempted = sum(sequence.state is RequestState.Preempted for sequence in waiting)
        return self._tally.snapshot(len(waiting), self.num_running, num_preempted, self._config.max_waiting_requests)

    def request_state(self, request_id: RequestId) -> RequestState | None:
        sequence = self._find(request_id)
        return None if sequence is None else sequence.state

    def scheduled_request(self, request_id: RequestId) -> ScheduledRequest | None:
        """The request's record with a fresh queue position, or None when untracked. Pure.  [SC-QUEUE-2; D-72]"""
        sequence = self._find(request_id)
        if sequence is None:
            return None
        return scheduled_request_of(sequence, self.queue_position(sequence))

    def _find(self, request_id: RequestId) -> SequenceState | None:
        if not self._driven:
            return self._requests.get(request_id)
        live = (sequence for group in (self._running, self._waiting) for sequence in group)
        return next((sequence for sequence in live if sequence.request_id == request_id), None)

    def _take_as_executed(self) -> None:
        """The outstanding batch ran: its tokens are computed, and who reached the end knows one token more."""
        schedule, self._outstanding = self._outstanding, Schedule()
        for sequence, before, new in zip(schedule.members, schedule.computed, schedule.scheduled, strict=True):
            sequence.num_computed_tokens = before + new
            if sequence.num_computed_tokens == sequence.num_known_tokens:
                sequence.num_known_tokens += 1

    def _drop_from_outstanding(self, sequence: SequenceState) -> None:
        schedule = self._outstanding
        if sequence in schedule.members:
            place = schedule.members.index(sequence)
            del schedule.members[place], schedule.computed[place], schedule.scheduled[place]

    def _forget(self, sequence: SequenceState, state: RequestState) -> None:
        self._drop_from_outstanding(sequence)
        if self._parked.pop(sequence.request_id, None) is not None:
            self._waiting.push(sequence)
        self.retire(sequence, state, self._clock())
        del self._requests[sequence.request_id]

    def _require_undriven(self, operation: str) -> None:
        if self._driven:
            raise SchedulerError(f"{operation}: a step loop drives this scheduler; call the loop's {operation} instead")


def prompt_length_of(request: InferenceRequest) -> int:
    """Prompt tokens: the metadata's figure, else the prompt's UTF-8 bytes (no byte-level vocabulary needs more). Pure.

    Raises RequestValidationError unless that is a positive integer.
    """
    length = request.metadata.get(PROMPT_TOKENS_KEY, len(request.prompt.encode()))
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise RequestValidationError(f"submit: the prompt must have at least one token, got {length!r}")
    return length


def scheduled_request_of(sequence: SequenceState, queue_position: int | None) -> ScheduledRequest:
    """The contract's record of a request. Pure."""
    request = sequence.request
    started = sequence.started_at_s
    return ScheduledRequest(
        request=request if request.priority == sequence.priority else replace(request, priority=sequence.priority),
        state=sequence.state,
        queue_position=queue_position,
        estimated_wait_time=None,
        tokens_processed=sequence.num_computed_tokens,
        allocated_resources=AllocatedResources(),
        submitted_at=datetime.fromtimestamp(sequence.submitted_at_s, UTC),
        started_at=None if started is None else datetime.fromtimestamp(started, UTC),
    )


def _batch_plan(schedule: Schedule, now_s: float) -> BatchPlan:
    return BatchPlan(
        batch_id=BatchId.new(),
        requests=[scheduled_request_of(sequence, None) for sequence in schedule.members],
        max_sequence_length=max(map(int.__add__, schedule.computed, schedule.scheduled)),
        estimated_time_ms=None,
        resource_requirements=BatchResourceRequirements(0, 0, 0, 0),
        created_at=datetime.fromtimestamp(now_s, UTC),
        scheduled_tokens={
            sequence.request_id: new for sequence, new in zip(schedule.members, schedule.scheduled, strict=True)
        },
    )
