"""Records of the scheduler contract: hints, plans, scheduled requests, preemption results.

Upstream: `ferrum_interfaces::scheduler`.  Clauses: SC-HINT-1, SC-PLAN-1..3 (specs/scheduler.md).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from ferrum_ref.types.devices import Device
from ferrum_ref.types.ids import BatchId, BlockId, RequestId
from ferrum_ref.types.record import U64, Record, Usize
from ferrum_ref.types.requests import InferenceRequest, RequestState
from ferrum_ref.types.sampling import Priority


class SchedulingPolicy(enum.Enum):
    """Interface-side policies (the types-side enum differs in the last ones, D-74)."""

    FCFS = "FCFS"
    Priority = "Priority"
    FairShare = "FairShare"
    SJF = "SJF"
    ResourceAware = "ResourceAware"
    SlaAware = "SlaAware"


@dataclass(frozen=True, slots=True)
class ResourceConstraints(Record):
    """Extra limits of a batch."""

    max_gpu_memory: U64 | None = None
    max_cpu_memory: U64 | None = None
    max_compute_units: Usize | None = None
    required_devices: list[Device] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BatchHint(Record):
    """Limits of a batch: running requests, and tokens processed in one step.  [SC-HINT-1; D-09]"""

    max_batch_size: Usize
    max_tokens: Usize
    target_latency_ms: U64 | None
    available_memory: U64 | None
    resource_constraints: ResourceConstraints

    @classmethod
    def simple(cls, max_batch_size: int) -> Self:
        """max_tokens = max_batch_size * 2048, nothing else set (upstream's rule, D-09). Pure."""
        return cls(max_batch_size, max_batch_size * 2048, None, None, ResourceConstraints())

    @classmethod
    def of(cls, max_batch_size: int, max_tokens: int) -> Self:
        """Both limits, nothing else set. Pure."""
        return cls(max_batch_size, max_tokens, None, None, ResourceConstraints())


@dataclass(slots=True)
class AllocatedResources(Record):
    """What a request holds."""

    kv_cache_blocks: list[BlockId] = field(default_factory=list)
    gpu_memory: U64 = 0
    cpu_memory: U64 = 0
    compute_units: Usize = 0


@dataclass(slots=True)
class ScheduledRequest(Record):
    """A request and its scheduling data (the types-side record of that name has five other fields).

    `queue_position` is computed whenever a record is made: 0 = next to be admitted, None when not waiting (D-72).
    """

    request: InferenceRequest
    state: RequestState
    queue_position: Usize | None
    estimated_wait_time: timedelta | None
    tokens_processed: Usize
    allocated_resources: AllocatedResources
    submitted_at: datetime
    started_at: datetime | None

    @classmethod
    def new(cls, request: InferenceRequest, submitted_at: datetime | None = None) -> Self:
        """Waiting with nothing allocated; submitted now unless `submitted_at` says when (D-79)."""
        submitted = datetime.now(UTC) if submitted_at is None else submitted_at
        return cls(request, RequestState.Waiting, None, None, 0, AllocatedResources(), submitted, None)

    def age(self, now: datetime | None = None) -> timedelta:
        """max(0, now - submitted_at)."""
        return _elapsed(self.submitted_at, now)

    def processing_time(self, now: datetime | None = None) -> timedelta | None:
        """max(0, now - started_at); None when not started."""
        return None if self.started_at is None else _elapsed(self.started_at, now)


def _elapsed(since: datetime, now: datetime | None) -> timedelta:
    return max(timedelta(0), (datetime.now(UTC) if now is None else now) - since)


@dataclass(frozen=True, slots=True)
class BatchResourceRequirements(Record):
    """What a batch needs."""

    gpu_memory: U64
    cpu_memory: U64
    kv_cache_blocks: Usize
    compute_units: Usize


@dataclass(slots=True)
class BatchPlan(Record):
    """A batch to execute.  [SC-PLAN-1..3; D-09, D-42]

    `scheduled_tokens` extends upstream's record: the tokens each member processes in this step (prefill chunk or decode
    token alike), on top of its `tokens_processed`.
    """

    batch_id: BatchId
    requests: list[ScheduledRequest]
    max_sequence_length: Usize
    estimated_time_ms: U64 | None
    resource_requirements: BatchResourceRequirements
    created_at: datetime
    scheduled_tokens: dict[RequestId, int] = field(default_factory=dict)

    def total_tokens(self) -> int:
        """Generation budget: the members' `max_tokens` added up, not the tokens of this step. Pure.  [SC-PLAN-2]"""
        return sum(member.request.sampling_params.max_tokens for member in self.requests)

    def num_scheduled_tokens(self) -> int:
        """Tokens this step processes. Pure.  [SC-PLAN-1]"""
        return sum(self.scheduled_tokens.values())

    def size(self) -> int:
        """Members. Pure."""
        return len(self.requests)

    def is_empty(self) -> bool:
        """No members. Pure."""
        return not self.requests

    def max_priority(self) -> Priority:
        """Highest priority of a member; Low, a legitimate value, when there is none. Pure.  [SC-PLAN-3; D-42]"""
        return max((member.request.priority for member in self.requests), default=Priority.Low)


@dataclass(frozen=True, slots=True)
class PreemptionState:
    """Where a preempted request stands; an empty checkpoint means its cache is recomputed."""

    kv_cache_checkpoint: bytes
    tokens_processed: int
    generation_state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PreemptionResult:
    """What a preemption did."""

    success: bool
    saved_state: PreemptionState | None
    freed_resources: AllocatedResources
