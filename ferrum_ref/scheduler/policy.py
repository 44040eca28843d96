"""Queue policies: a total order of requests, which says both who is admitted first and who is preempted first.

Clauses: SC-POLICY-1..4 (specs/scheduler.md).
"""

from __future__ import annotations

from typing import Protocol

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.scheduler import SchedulingPolicy as InterfacePolicy
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.types.config import SchedulingPolicy


class QueuePolicy(Protocol):
    """`key` orders requests: the smallest is admitted first, the largest running one is preempted first.

    It ends in the arrival number, so no two requests tie. Pure.
    """

    @property
    def name(self) -> str: ...
    def key(self, sequence: SequenceState) -> tuple[int, ...]: ...


class FcfsPolicy:
    """(arrival number): first come, first served; the last admitted is preempted first.  [SC-POLICY-1]"""

    __slots__ = ()
    name = "fcfs"

    def key(self, sequence: SequenceState) -> tuple[int, ...]:
        return (sequence.arrival_number,)


class PriorityPolicy:
    """(-priority, arrival number): the lowest priority, then the latest arrival, is preempted first.  [SC-POLICY-2]"""

    __slots__ = ()
    name = "priority"

    def key(self, sequence: SequenceState) -> tuple[int, ...]:
        return (-sequence.priority, sequence.arrival_number)


def make_policy(policy: SchedulingPolicy | InterfacePolicy) -> QueuePolicy:
    """The policy of that name; ContinuousBatch serves in FCFS order.  [SC-POLICY-3; D-74]

    Pure.  Raises UnsupportedError for a policy that is not implemented (upstream falls back to FIFO silently).
    """
    if policy.value in ("FCFS", "ContinuousBatch"):
        return FcfsPolicy()
    if policy.value == "Priority":
        return PriorityPolicy()
    raise UnsupportedError(f"make_policy: {policy.value} is not implemented; use FCFS, Priority or ContinuousBatch")
