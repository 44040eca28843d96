"""Queueing of requests and formation of batches.

Upstream: `ferrum_interfaces::scheduler`; the records are in `scheduler_data.py` and re-exported here. What the step
loop asks of a scheduler beyond this contract is in `step.py`.
Clauses: SC-HINT-1, SC-PLAN-1..3, SC-CONTRACT-1..8 (specs/scheduler.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.scheduler_data import (
    AllocatedResources,
    BatchHint,
    BatchPlan,
    BatchResourceRequirements,
    PreemptionResult,
    PreemptionState,
    ResourceConstraints,
    ScheduledRequest,
    SchedulingPolicy,
)
from ferrum_ref.types.config import SchedulerConfig
from ferrum_ref.types.metrics import SchedulerStats

if TYPE_CHECKING:
    from ferrum_ref.types.ids import RequestId
    from ferrum_ref.types.requests import InferenceRequest, InferenceResponse, RequestState
    from ferrum_ref.types.sampling import Priority

__all__ = [
    "AllocatedResources",
    "BatchHint",
    "BatchPlan",
    "BatchResourceRequirements",
    "PreemptionResult",
    "PreemptionState",
    "ResourceConstraints",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerMetrics",
    "SchedulingPolicy",
]

SchedulerMetrics: TypeAlias = SchedulerStats


class Scheduler(ABC):
    """Queueing and batch formation; crate-root alias `SchedulerInterface`.  [SC-CONTRACT-1..8]"""

    @abstractmethod
    async def submit(self, request: InferenceRequest) -> RequestId:
        """Enqueue; the request's own id.  [SC-CONTRACT-1]

        Raises SchedulerError: queue full; AlreadyExistsError: id in use; RequestValidationError: cannot ever run.
        """

    @abstractmethod
    async def next_batch(self, hint: BatchHint) -> BatchPlan | None:
        """A plan whose members are Running from now on, or None when nothing can run.  [SC-CONTRACT-2]"""

    @abstractmethod
    async def complete(self, request_id: RequestId, response: InferenceResponse) -> None:
        """Retire a running request.  Raises SchedulerError for one that is not running.  [SC-CONTRACT-3; D-73]"""

    @abstractmethod
    async def cancel(self, request_id: RequestId) -> bool:
        """Remove a request in whatever state; False if unknown.  [SC-CONTRACT-4; D-73]"""

    @abstractmethod
    async def update_priority(self, request_id: RequestId, priority: Priority) -> None:
        """Change the priority, keeping seniority.  Raises SchedulerError: unknown id.  [SC-CONTRACT-5; D-73]"""

    @abstractmethod
    def metrics(self) -> SchedulerMetrics:
        """Snapshot of the numbers. Pure.  [SC-CONTRACT-6; D-63]"""

    @abstractmethod
    def config(self) -> SchedulerConfig:
        """The settings. Pure."""

    def request_state(self, request_id: RequestId) -> RequestState | None:
        """State, or None when untracked (the default). Pure."""
        return None

    async def preempt(self, request_id: RequestId) -> PreemptionResult:
        """Stop a running request until `resume`.  Raises UnsupportedError (the default).  [SC-CONTRACT-7]"""
        raise UnsupportedError(f"{type(self).__name__}.preempt: not offered by this scheduler; cancel and resubmit")

    async def resume(self, request_id: RequestId) -> None:
        """Put a preempted request back in the queue.  Raises UnsupportedError (the default).  [SC-CONTRACT-7]"""
        raise UnsupportedError(f"{type(self).__name__}.resume: not offered by this scheduler; cancel and resubmit")
