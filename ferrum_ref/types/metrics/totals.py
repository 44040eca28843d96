"""What an engine has counted since its start; `ferrum_ref.types.metrics` re-exports these names.

Clause: TY-METRICS-4 (specs/types.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.record import F32, F64, U64, Json, Record, Usize


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """One error as it was recorded."""

    timestamp: datetime
    error_type: str
    message: str
    request_id: RequestId | None
    context: dict[str, Json]


@dataclass(slots=True)
class ErrorStats(Record):
    """Errors so far; mutable."""

    total_errors: U64 = 0
    errors_by_type: dict[str, U64] = field(default_factory=dict)
    error_rate: F32 = 0.0
    recent_errors: list[ErrorEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class QueueMetrics(Record):
    """The waiting queue."""

    current_queue_length: Usize = 0
    avg_queue_wait_time_ms: F64 = 0.0
    queue_throughput_rps: F32 = 0.0
    queue_rejection_rate: F32 = 0.0


@dataclass(frozen=True, slots=True)
class ResourceMetrics:
    """Utilisation of resources, each 0-1 (upstream leaves the scale open)."""

    cpu_utilization: F32 = 0.0
    memory_utilization: F32 = 0.0
    gpu_utilization: F32 | None = None
    network_utilization: F32 = 0.0
    disk_utilization: F32 = 0.0


@dataclass(frozen=True, slots=True)
class PerformanceBreakdown:
    """Where the time went, in milliseconds."""

    tokenization_time_ms: F64 = 0.0
    model_execution_time_ms: F64 = 0.0
    sampling_time_ms: F64 = 0.0
    scheduling_time_ms: F64 = 0.0
    memory_operations_time_ms: F64 = 0.0
    other_overhead_time_ms: F64 = 0.0


@dataclass(frozen=True, slots=True)
class EngineMetrics(Record):
    """Totals of an engine; all zero at first."""

    total_requests: U64 = 0
    successful_requests: U64 = 0
    failed_requests: U64 = 0
    avg_request_latency_ms: F64 = 0.0
    p95_request_latency_ms: F64 = 0.0
    p99_request_latency_ms: F64 = 0.0
    throughput_rps: F32 = 0.0
    tokens_per_second: F32 = 0.0
    queue_metrics: QueueMetrics = field(default_factory=QueueMetrics)
    resource_utilization: ResourceMetrics = field(default_factory=ResourceMetrics)
    error_stats: ErrorStats = field(default_factory=ErrorStats)
    performance_breakdown: PerformanceBreakdown = field(default_factory=PerformanceBreakdown)
