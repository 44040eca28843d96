"""Counts and sums behind the scheduler's metrics.  Clauses: SC-CONTRACT-6 (specs/scheduler.md)."""

from __future__ import annotations

from collections.abc import Iterator

from ferrum_ref.interfaces.step import Schedule, SequenceState
from ferrum_ref.types.metrics import SchedulerStats
from ferrum_ref.types.requests import RequestState

_ENDED = (RequestState.Completed, RequestState.Failed, RequestState.Cancelled)


class Tally:
    """Gauges are read from the queues; only what has passed is counted here.  [SC-CONTRACT-6; D-63]"""

    __slots__ = ("_execution_s", "_first_s", "_last_s", "_num_ended", "_num_started", "_num_submitted", "_wait_s")

    def __init__(self) -> None:
        self._first_s: float | None = None
        self._last_s = 0.0
        self._num_submitted = 0
        self._num_started = 0
        self._num_ended = dict.fromkeys(_ENDED, 0)
        self._wait_s = 0.0
        self._execution_s = 0.0

    @property
    def num_submitted(self) -> int:
        return self._num_submitted

    @property
    def num_ended(self) -> int:
        return sum(self._num_ended.values())

    def submitted(self, now_s: float) -> None:
        self._num_submitted += 1
        if self._first_s is None:
            self._first_s = now_s
        self._last_s = max(self._last_s, now_s)

    def applied(self, schedule: Schedule) -> None:
        """Waits end at the first step that was committed."""
        for sequence in schedule.started:
            if sequence.started_at_s is not None:
                self._num_started += 1
                self._wait_s += sequence.started_at_s - sequence.submitted_at_s

    def retired(self, sequence: SequenceState, state: RequestState, now_s: float) -> None:
        self._num_ended[state] += 1
        self._last_s = max(self._last_s, now_s)
        if state is RequestState.Completed and sequence.started_at_s is not None:
            self._execution_s += now_s - sequence.started_at_s

    def snapshot(self, num_waiting: int, num_running: int, num_preempted: int, max_waiting: int) -> SchedulerStats:
        """The contract's numbers. Pure.

        wait = first start - submission, mean over started requests; execution = end - first start, mean over completed
        ones; throughput = completed / (last event - first submission).
        """
        completed = self._num_ended[RequestState.Completed]
        uptime_s = 0.0 if self._first_s is None else self._last_s - self._first_s
        return SchedulerStats(
            waiting_requests=num_waiting,
            running_requests=num_running,
            preempted_requests=num_preempted,
            completed_requests=completed,
            failed_requests=self._num_ended[RequestState.Failed],
            cancelled_requests=self._num_ended[RequestState.Cancelled],
            avg_wait_time_ms=1000.0 * self._wait_s / self._num_started if self._num_started else 0.0,
            avg_execution_time_ms=1000.0 * self._execution_s / completed if completed else 0.0,
            throughput_rps=completed / uptime_s if uptime_s > 0 else 0.0,
            queue_utilization=num_waiting / max_waiting if max_waiting else 0.0,
        )

    def state_parts(self) -> Iterator[object]:
        yield (self._first_s, self._last_s, self._num_submitted, self._num_started, self._wait_s, self._execution_s)
        yield tuple(self._num_ended.values())
