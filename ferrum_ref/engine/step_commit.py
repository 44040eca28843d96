"""Applying a step: tokens appended, full blocks registered, finished requests retired; one step or a whole stretch.

Clauses: ST-LOOP-3..8, ST-STRETCH-1..4 (specs/step_loop.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ferrum_ref.engine.intake import MAX_TOKEN_ID
from ferrum_ref.engine.ledger import Ledger
from ferrum_ref.engine.plan import StepEvents, StepPlan, StepResult
from ferrum_ref.errors import FerrumError, InternalError, InvalidParameterError, SchedulerError
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.interfaces.step import FILLER_TOKEN_ID, SequenceState, StepCache, StepScheduler
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import RequestState
from ferrum_ref.types.sampling import FinishReason

STATE_OF = {FinishReason.Cancelled: RequestState.Cancelled, FinishReason.Error: RequestState.Failed}
Outcome = int | FerrumError | None  # of one member: its token, its error, or nothing because it does not sample


class StepCommit:
    """State of a step loop and what a commit does to it; `StepLoop` is the way in."""

    def __init__(self, scheduler: StepScheduler, cache: StepCache, hint: BatchHint) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._hint = hint
        self._sequences: dict[RequestId, SequenceState] = {}
        self._in_flight: StepPlan | None = None
        self._further_steps: int | None = None  # stretch of the plan in flight, while nothing has come in between
        self._ending: list[tuple[SequenceState, float]] = []  # ended while in flight, with the time
        self._step_index = 0
        self._ledger = Ledger()

    def _require_in_flight(self, plan: StepPlan, operation: str) -> None:
        if plan is not self._in_flight:
            raise SchedulerError(f"{operation}: this plan (step {plan.step_index}) is not the one in flight")

    def _touches(self, sequence: SequenceState) -> bool:
        """Does the step in flight use or take blocks of this request, or would an abort give it some."""
        if sequence.handle is not None or self._in_flight is None:
            return True
        return any(victim is sequence for victim, _ in self._in_flight.schedule.preempted)

    def _apply(self, plan: StepPlan, outcomes: Sequence[Outcome], now_s: float) -> StepEvents:
        """Commit one step with a token, an error or nothing for each member."""
        events = StepEvents()
        ended: list[tuple[SequenceState, FinishReason]] = []
        schedule = plan.schedule
        self._book(plan)
        for sequence, before, new, outcome in zip(
            schedule.members, schedule.computed, schedule.scheduled, outcomes, strict=True
        ):
            computed = before + new
            self._advance(sequence, computed)
            if sequence.ending is not None:
                continue
            if isinstance(outcome, FerrumError):
                events.errors[sequence.request_id] = outcome
                ended.append((sequence, FinishReason.Error))
                continue
            if outcome is not None:
                self._append(sequence, outcome, events, ended)
            self._cache.register_blocks(sequence)
        self._step_index += 1
        self._finish(events, ended, now_s)
        return events

    def _append(
        self, sequence: SequenceState, token: int, events: StepEvents, ended: list[tuple[SequenceState, FinishReason]]
    ) -> None:
        """One generated token, and whether it is the last.  [ST-LOOP-4; D-27, D-28]"""
        sequence.tokens.append(token)
        sequence.num_known_tokens += 1
        self._ledger.num_generated_tokens += 1
        events.num_tokens += 1
        events.tokens.append((sequence.request_id, token))
        if sequence.num_known_tokens == sequence.num_prompt_tokens + 1:
            events.prompts_completed.append(sequence.request_id)
        if token in sequence.stop_token_ids:
            ended.append((sequence, FinishReason.EOS))
        elif sequence.num_known_tokens >= sequence.max_known_tokens:
            ended.append((sequence, FinishReason.Length))

    def _apply_decode(self, plan: StepPlan, num_steps: int, now_s: float) -> StepEvents:
        """Commit `num_steps` decode steps of a plan nobody left, with filler tokens.  [ST-STRETCH-3]

        Written for speed: what is done per member does not depend on the number of steps.
        """
        events = StepEvents(num_steps=num_steps)
        ended: list[tuple[SequenceState, FinishReason]] = []
        members = plan.schedule.members
        self._book(plan)
        filler = array("q", (FILLER_TOKEN_ID,)) * num_steps
        for sequence, before in zip(members, plan.schedule.computed, strict=True):
            computed = before + num_steps
            sequence.num_computed_tokens = computed
            sequence.num_known_tokens = known = computed + 1
            sequence.tokens.extend(filler)
            handle = sequence.handle
            if handle is None:
                raise InternalError(f"commit_stretch: request {sequence.request_id} holds no cache")
            handle.table.sequence_length = computed
            if before < sequence.num_prompt_tokens:
                events.prompts_completed.append(sequence.request_id)
            if FILLER_TOKEN_ID in sequence.stop_token_ids:
                ended.append((sequence, FinishReason.EOS))
            elif known >= sequence.max_known_tokens:
                ended.append((sequence, FinishReason.Length))
        self._cache.grow_decode(members, num_steps)
        num_further = (num_steps - 1) * len(members)
        events.num_tokens = num_further + len(members)
        self._ledger.num_computed_tokens += num_further
        self._ledger.num_generated_tokens += events.num_tokens
        self._step_index += num_steps
        self._finish(events, ended, now_s)
        return events

    def _book(self, plan: StepPlan) -> None:
        """Make the plan final and count it (its first step, in a stretch)."""
        schedule, ledger = plan.schedule, self._ledger
        self._cache.end_step()
        self._scheduler.applied(schedule)
        ledger.num_computed_tokens += plan.num_scheduled_tokens
        for _, lost in schedule.preempted:
            ledger.num_lost_tokens += lost
        num_admitted = len(schedule.admitted)
        if num_admitted:
            ledger.num_hit_tokens += sum(schedule.computed[-num_admitted:])

    def _advance(self, sequence: SequenceState, computed: int) -> None:
        if sequence.handle is None:
            raise InternalError(f"commit: request {sequence.request_id} holds no cache")
        sequence.num_computed_tokens = computed
        sequence.handle.table.sequence_length = computed

    def _finish(self, events: StepEvents, ended: list[tuple[SequenceState, FinishReason]], now_s: float) -> None:
        for sequence, reason in ended:
            events.finished.append((sequence.request_id, reason))
            self._retire(sequence, reason, now_s)
        self._land()

    def _land(self) -> None:
        """The step is over: what was ended meanwhile now goes."""
        self._in_flight = None
        self._further_steps = None
        ending, self._ending = self._ending, []
        for sequence, now_s in ending:
            if sequence.ending is not None:
                self._retire(sequence, sequence.ending, now_s)

    def _retire(self, sequence: SequenceState, reason: FinishReason, now_s: float) -> None:
        self._scheduler.retire(sequence, STATE_OF.get(reason, RequestState.Completed), now_s)
        self._ledger.retire(sequence)
        if sequence.handle is not None:
            self._cache.release(sequence)
        del self._sequences[sequence.request_id]

    def _count_further(self, plan: StepPlan) -> int:
        """Further steps with the same members, one token each.  [ST-STRETCH-1..2]"""
        if not plan.is_decode or self._ending:
            return 0
        members = plan.schedule.members
        steps = min([sequence.max_known_tokens - sequence.num_known_tokens for sequence in members])
        if steps <= 1 or any(FILLER_TOKEN_ID in sequence.stop_token_ids for sequence in members):
            return 0
        if self._scheduler.num_waiting:
            ahead = self._scheduler.next_waiting(self._hint, len(members))
            if ahead is not None and not self._cache.stays_blocked(*ahead):
                return 0
        return self._cache.decode_steps(members, steps) - 1


def outcomes_of(plan: StepPlan, result: StepResult) -> list[Outcome]:
    """One outcome per member, in order. Pure.  Raises InvalidParameterError: ids outside the plan.  [ST-LOOP-5..6]"""
    outcomes: list[Outcome] = []
    known = set()
    for member in plan.sequences:
        known.add(member.request_id)
        error = result.errors.get(member.request_id)
        if error is not None:
            outcomes.append(error)
            continue
        token = result.tokens.get(member.request_id)
        if not member.samples:
            outcomes.append(None)
        elif token is None:
            outcomes.append(InternalError(f"commit: the executor gave no token for request {member.request_id}"))
        elif not 0 <= token <= MAX_TOKEN_ID:
            outcomes.append(InternalError(f"commit: request {member.request_id}: {token} is no token id"))
        else:
            outcomes.append(int(token))
    strangers = [request_id for request_id in (*result.tokens, *result.errors) if request_id not in known]
    if strangers:
        raise InvalidParameterError(
            f"commit: step {plan.step_index} does not run request {strangers[0]}; return results of its members only"
        )
    return outcomes
