"""Iteration-level scheduling with one token budget: the synchronous core, without tokens, blocks or time of its own.

A step first serves the running requests in the order they were admitted, then, unless it had to preempt, admits waiting
ones in policy order; each gets min(tokens left to compute, chunk limit, budget left).
Clauses: SC-STEP-1..8 (specs/scheduler.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from ferrum_ref.errors import InternalError, SchedulerError, UnsupportedError
from ferrum_ref.interfaces.scheduler import BatchHint, ResourceConstraints, SchedulerConfig
from ferrum_ref.interfaces.step import BlockLender, Schedule, SequenceState
from ferrum_ref.scheduler.policy import QueuePolicy, make_policy
from ferrum_ref.scheduler.tally import Tally
from ferrum_ref.scheduler.waiting import WaitingQueue
from ferrum_ref.types.requests import RequestState
from ferrum_ref.types.sampling import Priority


class StepSchedulerCore:
    """Running list, waiting queue and the decision of one step."""

    def __init__(
        self, config: SchedulerConfig, policy: QueuePolicy | None = None, max_chunk_tokens: int | None = None
    ) -> None:
        """`max_chunk_tokens` caps one request's tokens per step; None = the budget alone does.

        Raises UnsupportedError for settings that are not implemented, InvalidParameterError for values out of range.
        """
        _require_supported(config, max_chunk_tokens)
        self._config = config
        self._policy = make_policy(config.policy) if policy is None else policy
        self._max_chunk_tokens = max_chunk_tokens
        self._running: list[SequenceState] = []
        self._waiting = WaitingQueue(self._policy)
        self._num_arrivals = 0
        self._driven = False
        self._tally = Tally()

    def config(self) -> SchedulerConfig:
        return self._config

    @property
    def policy(self) -> QueuePolicy:
        return self._policy

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_live

    @property
    def num_running(self) -> int:
        return len(self._running)

    def attach(self) -> None:
        """Raises SchedulerError when requests or another step loop are here already."""
        if self._driven or self._running or self._waiting.num_live:
            raise SchedulerError("ContinuousBatchScheduler.attach: already in use; make a new scheduler for the loop")
        self._driven = True

    def require_usable(self, hint: BatchHint) -> None:
        """Raises SchedulerError for limits nothing fits, UnsupportedError for those not implemented.  [SC-HINT-1]"""
        if hint.max_batch_size < 1 or hint.max_tokens < 1:
            raise SchedulerError(
                "BatchHint: max_batch_size and max_tokens must be >= 1, got"
                f" {hint.max_batch_size} and {hint.max_tokens}"
            )
        if hint.target_latency_ms is not None or hint.available_memory is not None:
            raise UnsupportedError("BatchHint: target_latency_ms and available_memory are not implemented; leave None")
        if hint.resource_constraints != ResourceConstraints():
            raise UnsupportedError("BatchHint: resource_constraints are not implemented; leave them empty")

    def enqueue(self, sequence: SequenceState) -> None:
        """Give an arrival number and queue.  Raises SchedulerError when the queue is full.  [SC-STEP-1]"""
        limit = self._config.max_waiting_requests
        if self._waiting.num_live >= limit:
            raise SchedulerError(f"submit: the waiting queue is full ({limit} requests); retry later")
        sequence.arrival_number = self._num_arrivals
        self._num_arrivals += 1
        self._tally.submitted(sequence.submitted_at_s)
        self._waiting.push(sequence)

    def fill(self, schedule: Schedule, cache: BlockLender, hint: BatchHint, now_s: float) -> None:
        """Decide the next step into the empty `schedule`.  [SC-STEP-2..6]

        Mutates running, waiting, their requests and, through it, `cache`; `undo` takes all of that back.
        """
        budget = hint.max_tokens
        chunk = budget if self._max_chunk_tokens is None else min(budget, self._max_chunk_tokens)
        members, computed_before, scheduled = schedule.members, schedule.computed, schedule.scheduled
        for sequence in self._running:
            if not budget:
                break
            computed = sequence.num_computed_tokens
            new = sequence.num_known_tokens - computed
            if new > 1 and (new > chunk or new > budget):
                new = min(chunk, budget)
                schedule.partial.append(len(members))
            handle = sequence.handle
            if handle is None:
                raise InternalError(f"fill: running request {sequence.request_id} has no cache")
            if computed + new > handle.writable_tokens and not cache.grow(sequence, computed + new):
                if schedule.partial and schedule.partial[-1] == len(members):
                    schedule.partial.pop()
                budget = self._fill_by_preempting(schedule, cache, budget, chunk)
                break
            members.append(sequence)
            computed_before.append(computed)
            scheduled.append(new)
            budget -= new
        if budget and self._waiting.num_live and not schedule.preempted:
            self._admit(schedule, cache, budget, chunk, self._slots(hint), now_s)

    def _fill_by_preempting(self, schedule: Schedule, cache: BlockLender, budget: int, chunk: int) -> int:
        """Serve the rest of the running requests, preempting until blocks suffice; the budget left.  [SC-STEP-4]"""
        members, partial = schedule.members, schedule.partial
        schedule.running_before = list(self._running)
        while len(members) < len(self._running) and budget:
            sequence = self._running[len(members)]
            computed = sequence.num_computed_tokens
            left = sequence.num_known_tokens - computed
            new = min(left, chunk, budget)
            if not cache.grow(sequence, computed + new):
                budget += self._preempt_one(schedule, cache)
                continue
            if new < left:
                partial.append(len(members))
            members.append(sequence)
            schedule.computed.append(computed)
            schedule.scheduled.append(new)
            budget -= new
        return budget

    def _preempt_one(self, schedule: Schedule, cache: BlockLender) -> int:
        """Send the policy's victim back to the waiting queue; the tokens this gives back to the budget."""
        victim = max(self._running, key=self._policy.key)
        place = self._running.index(victim)
        returned = 0
        if place < len(schedule.members):
            del schedule.members[place], schedule.computed[place]
            returned = schedule.scheduled.pop(place)
            schedule.partial[:] = [i - (i > place) for i in schedule.partial if i != place]
        del self._running[place]
        schedule.preempted.append((victim, victim.num_computed_tokens))
        self._send_back(victim, cache)
        return returned

    def _send_back(self, victim: SequenceState, cache: BlockLender) -> None:
        cache.release(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.state = RequestState.Preempted
        self._waiting.push(victim)

    def _admit(self, schedule: Schedule, cache: BlockLender, budget: int, chunk: int, slots: int, now_s: float) -> None:
        """Admit waiting requests in policy order while budget, slots and blocks last.  [SC-STEP-5]"""
        running = self._running
        while budget and len(running) < slots:
            sequence = self._waiting.peek()
            if sequence is None:
                return
            hits = cache.match_prefix(sequence)
            computed = len(hits) * cache.block_size
            left = sequence.num_known_tokens - computed
            new = min(left, chunk, budget)
            if not cache.admit(sequence, hits, computed + new):
                return
            if schedule.running_before is None:
                schedule.running_before = list(running)
            schedule.admitted.append((sequence, sequence.state))
            self._waiting.remove(sequence)
            running.append(sequence)
            sequence.num_computed_tokens = computed
            sequence.state = RequestState.Running
            if sequence.started_at_s is None:
                sequence.started_at_s = now_s
                schedule.started.append(sequence)
            if new < left:
                schedule.partial.append(len(schedule.members))
            schedule.members.append(sequence)
            schedule.computed.append(computed)
            schedule.scheduled.append(new)
            budget -= new

    def undo(self, schedule: Schedule) -> None:
        """Take `fill` back; the cache's own `undo_step` must have run before.  [SC-STEP-7]"""
        for sequence, state in reversed(schedule.admitted):
            sequence.num_computed_tokens = 0
            sequence.state = state
            self._waiting.push(sequence)
        for sequence in schedule.started:
            sequence.started_at_s = None
        for sequence, computed in reversed(schedule.preempted):
            self._waiting.remove(sequence)
            sequence.num_computed_tokens = computed
            sequence.num_preemptions -= 1
            sequence.state = RequestState.Running
        if schedule.running_before is not None:
            self._running[:] = schedule.running_before

    def preempt_now(self, sequence: SequenceState, cache: BlockLender) -> None:
        """Preempt a running request between steps (its cache contents were lost).  [SC-STEP-7]"""
        self._running.remove(sequence)
        self._send_back(sequence, cache)

    def applied(self, schedule: Schedule) -> None:
        """Count what the committed step did."""
        self._tally.applied(schedule)

    def retire(self, sequence: SequenceState, state: RequestState, now_s: float) -> None:
        """Forget a request that ended; its cache is the caller's to free.  [SC-STEP-8]"""
        if sequence.queue_entry is not None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
        sequence.state = state
        self._tally.retired(sequence, state, now_s)

    def change_priority(self, sequence: SequenceState, priority: Priority) -> None:
        """New priority, old seniority; a waiting request moves at once.  [SC-QUEUE-1; D-73]"""
        sequence.priority = priority
        if sequence.queue_entry is not None:
            self._waiting.remove(sequence)
            self._waiting.push(sequence)

    def next_waiting(self, hint: BatchHint, num_decodes: int) -> tuple[SequenceState, int] | None:
        """(request, its token limit) that a step after `num_decodes` repeated decodes would try to admit. Pure."""
        budget = hint.max_tokens - num_decodes
        if budget <= 0 or len(self._running) >= self._slots(hint):
            return None
        sequence = self._waiting.peek()
        if sequence is None:
            return None
        return sequence, budget if self._max_chunk_tokens is None else min(budget, self._max_chunk_tokens)

    def queue_position(self, sequence: SequenceState) -> int | None:
        """0 = admitted next; None when not waiting. Pure.  [SC-QUEUE-2; D-72]"""
        return self._waiting.position(sequence)

    def check_invariants(self, sequences: Iterable[SequenceState]) -> None:
        """Every live request waits or runs, once.  Raises InternalError.  [SC-STEP-8]"""
        live = {id(sequence) for sequence in sequences}
        waiting, running = list(self._waiting), self._running
        seen = {id(sequence) for sequence in (*waiting, *running)}
        if len(waiting) + len(running) != len(seen) or seen != live or len(waiting) != self._waiting.num_live:
            raise InternalError(
                f"Scheduler invariant broken: {len(live)} live requests, {len(waiting)} wait and {len(running)} run"
            )

    def state_parts(self) -> Iterable[object]:
        """Everything that decides future behaviour, as a canonical stream of plain values. Pure."""
        yield self._num_arrivals
        for group in (self._waiting, self._running):
            for sequence in group:
                yield (sequence.arrival_number, str(sequence.request_id), int(sequence.priority), sequence.state.value)
                yield (sequence.num_prompt_tokens, sequence.num_known_tokens, sequence.num_computed_tokens)
                yield (sequence.max_known_tokens, sequence.num_preemptions, sequence.started_at_s)
                yield sequence.tokens.tobytes()
            yield "end of group"
        yield from self._tally.state_parts()

    def _slots(self, hint: BatchHint) -> int:
        return min(hint.max_batch_size, self._config.max_running_requests)


def _require_supported(config: SchedulerConfig, max_chunk_tokens: int | None) -> None:
    if not config.enable_preemption:
        raise UnsupportedError("SchedulerConfig: enable_preemption=False is not implemented; leave it True")
    if config.enable_load_balancing or config.enable_sla_enforcement or config.fair_share_weights:
        raise UnsupportedError(
            "SchedulerConfig: load balancing, SLA enforcement and fair shares are not implemented; leave them off"
        )
    if config.max_running_requests < 1 or (max_chunk_tokens is not None and max_chunk_tokens < 1):
        raise SchedulerError(
            "ContinuousBatchScheduler: max_running_requests and max_chunk_tokens must be >= 1, got"
            f" {config.max_running_requests} and {max_chunk_tokens}"
        )
