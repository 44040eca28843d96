"""What a step is, what came out of it, and what happened.  Clauses: ST-PLAN-1..4 (specs/step_loop.md)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import NamedTuple

from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.scheduler import (
    AllocatedResources,
    BatchPlan,
    BatchResourceRequirements,
    ScheduledRequest,
)
from ferrum_ref.interfaces.step import Schedule, SequenceState
from ferrum_ref.types.ids import BatchId, RequestId
from ferrum_ref.types.sampling import FinishReason

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ScheduledSequence(NamedTuple):
    """One request's share of a step: tokens [num_computed_tokens, + num_scheduled_tokens) of its known tokens."""

    request_id: RequestId
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool  # the share ends at the last known token, so one new token comes out


class StepPlan:
    """One step: who runs, with how many tokens. Made by `StepLoop.plan`; never changes.  [ST-PLAN-1..3]

    `computed_tokens[i]` and `scheduled_tokens[i]` are the i-th member's numbers as plain lists (read only), for callers
    that need no objects.
    """

    __slots__ = (
        "_batch_plan",
        "_bytes_per_block",
        "_sequences",
        "computed_tokens",
        "num_scheduled_tokens",
        "planned_at_s",
        "preempted",
        "schedule",
        "scheduled_tokens",
        "step_index",
    )

    def __init__(self, step_index: int, schedule: Schedule, planned_at_s: float, bytes_per_block: int = 0) -> None:
        self.step_index = step_index
        self.schedule = schedule
        self.planned_at_s = planned_at_s
        self.computed_tokens = schedule.computed
        self.scheduled_tokens = schedule.scheduled
        self.num_scheduled_tokens = sum(schedule.scheduled)
        self.preempted: tuple[RequestId, ...] = tuple(sequence.request_id for sequence, _ in schedule.preempted)
        self._bytes_per_block = bytes_per_block
        self._sequences: tuple[ScheduledSequence, ...] | None = None
        self._batch_plan: BatchPlan | None = None

    @property
    def num_sequences(self) -> int:
        """Members. Pure."""
        return len(self.scheduled_tokens)

    @property
    def is_decode(self) -> bool:
        """Every member computes exactly its last known token. Pure."""
        return self.num_scheduled_tokens == len(self.scheduled_tokens) and not self.schedule.partial

    @property
    def sequences(self) -> tuple[ScheduledSequence, ...]:
        """The members in order. Pure."""
        if self._sequences is None:
            ids = [sequence.request_id for sequence in self.schedule.members]
            samples = [True] * len(ids)
            for index in self.schedule.partial:
                samples[index] = False
            self._sequences = tuple(map(ScheduledSequence, ids, self.computed_tokens, self.scheduled_tokens, samples))
        return self._sequences

    @property
    def batch_plan(self) -> BatchPlan:
        """Upstream's record of this step; first read it while the step is in flight.  [ST-PLAN-3; D-09]"""
        if self._batch_plan is None:
            self._batch_plan = batch_plan_of(self, self._bytes_per_block)
        return self._batch_plan

    def digest(self) -> str:
        """blake2b-128 of step index, members, preempted: equal for equal plans, anywhere. Pure.  [ST-PLAN-2]"""
        hasher = blake2b(self.step_index.to_bytes(8, "little"), digest_size=16)
        for request_id, computed, scheduled, samples in self.sequences:
            hasher.update(request_id.value.bytes)
            hasher.update(b"".join(number.to_bytes(8, "little") for number in (computed, scheduled, samples)))
        hasher.update(b"preempted")
        for request_id in self.preempted:
            hasher.update(request_id.value.bytes)
        return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor made of a plan: a token for every sampling member, or the error that befell it."""

    tokens: Mapping[RequestId, int]
    errors: Mapping[RequestId, FerrumError] = field(default_factory=dict)


@dataclass(slots=True)
class StepEvents:
    """What a commit did, in the members' order.  [ST-PLAN-4]

    `tokens` stays empty for steps committed without token values (`commit_stretch`); `num_tokens` counts either way.
    """

    tokens: list[tuple[RequestId, int]] = field(default_factory=list)
    prompts_completed: list[RequestId] = field(default_factory=list)  # got their first generated token
    finished: list[tuple[RequestId, FinishReason]] = field(default_factory=list)
    errors: dict[RequestId, FerrumError] = field(default_factory=dict)  # of those finished with reason Error
    num_tokens: int = 0
    num_steps: int = 1


def batch_plan_of(plan: StepPlan, bytes_per_block: int) -> BatchPlan:
    """Upstream's `BatchPlan` of a step; its id derives from the plan's digest, so replays repeat it. Pure."""
    members = [_scheduled_request(sequence, bytes_per_block) for sequence in plan.schedule.members]
    num_blocks = sum(len(member.allocated_resources.kv_cache_blocks) for member in members)
    ends = map(int.__add__, plan.computed_tokens, plan.scheduled_tokens)
    return BatchPlan(
        batch_id=BatchId(uuid.UUID(hex=plan.digest(), version=4)),
        requests=members,
        max_sequence_length=max(ends, default=0),
        estimated_time_ms=None,
        resource_requirements=BatchResourceRequirements(num_blocks * bytes_per_block, 0, num_blocks, 0),
        created_at=datetime_of(plan.planned_at_s),
        scheduled_tokens={member.request_id: member.num_scheduled_tokens for member in plan.sequences},
    )


def _scheduled_request(sequence: SequenceState, bytes_per_block: int) -> ScheduledRequest:
    blocks = [] if sequence.handle is None else list(sequence.handle.table.physical_blocks)
    request = sequence.request
    return ScheduledRequest(
        request=request if request.priority == sequence.priority else replace(request, priority=sequence.priority),
        state=sequence.state,
        queue_position=None,
        estimated_wait_time=None,
        tokens_processed=sequence.num_computed_tokens,
        allocated_resources=AllocatedResources(blocks, len(blocks) * bytes_per_block),
        submitted_at=datetime_of(sequence.submitted_at_s),
        started_at=None if sequence.started_at_s is None else datetime_of(sequence.started_at_s),
    )


def datetime_of(now_s: float) -> datetime:
    """Seconds since 1970 (or since a simulation's start) as UTC. Pure."""
    return EPOCH + timedelta(seconds=now_s)
