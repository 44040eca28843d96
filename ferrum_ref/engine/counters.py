"""What an engine counts about itself, and the metrics made of it.  Clauses: EN-METRICS-1..3 (specs/engine.md)."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from datetime import datetime

from ferrum_ref.errors import FerrumError
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.metrics import (
    EngineMetrics,
    ErrorEvent,
    ErrorStats,
    PerformanceBreakdown,
    QueueMetrics,
    ResourceMetrics,
)

NUM_LATENCIES = 1000
NUM_RECENT_ERRORS = 20


class EngineCounters:
    """Totals since the engine was built, and the latencies of the last 1000 answers.  [EN-METRICS-1..3]"""

    def __init__(self) -> None:
        self.num_accepted = 0
        self.num_rejected = 0
        self.num_successful = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_generated_tokens = 0
        self.num_steps = 0
        self.num_preemptions = 0
        self.tokenize_s = 0.0
        self.execute_s = 0.0
        self.sample_s = 0.0
        self.schedule_s = 0.0
        self.queue_wait_s = 0.0
        self.num_started = 0
        self._latencies_ms: deque[float] = deque(maxlen=NUM_LATENCIES)
        self._errors_by_kind: Counter[str] = Counter()
        self._recent_errors: deque[ErrorEvent] = deque(maxlen=NUM_RECENT_ERRORS)

    def answered(self, latency_s: float) -> None:
        self.num_successful += 1
        self._latencies_ms.append(1e3 * latency_s)

    def failed(self, error: FerrumError, request_id: RequestId | None, when: datetime) -> None:
        """Record an error of a request or a step."""
        self._errors_by_kind[error.kind] += 1
        self._recent_errors.append(ErrorEvent(when, error.kind, error.message, request_id, {}))

    def metrics(self, uptime_s: float, num_waiting: int, kv_utilization: float) -> EngineMetrics:
        """The totals in the contract's form; rates are over the engine's whole life.  Pure.  [EN-METRICS-1..3]"""
        num_errors = sum(self._errors_by_kind.values())
        num_asked = self.num_accepted + self.num_rejected
        return EngineMetrics(
            total_requests=self.num_accepted,
            successful_requests=self.num_successful,
            failed_requests=self.num_failed,
            avg_request_latency_ms=_mean(self._latencies_ms),
            p95_request_latency_ms=percentile(self._latencies_ms, 0.95),
            p99_request_latency_ms=percentile(self._latencies_ms, 0.99),
            throughput_rps=_ratio(self.num_successful, uptime_s),
            tokens_per_second=_ratio(self.num_generated_tokens, uptime_s),
            queue_metrics=QueueMetrics(
                current_queue_length=num_waiting,
                avg_queue_wait_time_ms=1e3 * _ratio(self.queue_wait_s, self.num_started),
                queue_throughput_rps=_ratio(self.num_started, uptime_s),
                queue_rejection_rate=_ratio(self.num_rejected, num_asked),
            ),
            resource_utilization=ResourceMetrics(memory_utilization=kv_utilization),
            error_stats=ErrorStats(
                num_errors, dict(self._errors_by_kind), _ratio(num_errors, num_asked), list(self._recent_errors)
            ),
            performance_breakdown=PerformanceBreakdown(
                tokenization_time_ms=1e3 * self.tokenize_s,
                model_execution_time_ms=1e3 * self.execute_s,
                sampling_time_ms=1e3 * self.sample_s,
                scheduling_time_ms=1e3 * self.schedule_s,
            ),
        )


def percentile(values: Sequence[float] | deque[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of the values do not exceed; 0 for none.  Pure.  [EN-METRICS-2]"""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def _mean(values: deque[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
