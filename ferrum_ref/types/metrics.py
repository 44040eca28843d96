"""What engines, schedulers and caches report about themselves.

Percent fields run 0-100; rate, ratio and utilisation fields run 0-1.
Upstream: `ferrum_types::metrics`.  Clauses: TY-METRICS-1..3 (specs/types.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from ferrum_ref.types.ids import ModelId, RequestId
from ferrum_ref.types.record import F32, F64, U64, Json, Record, Usize


@dataclass(slots=True)
class MemoryUsage(Record):
    """Memory in bytes; mutable."""

    total_bytes: Usize
    used_bytes: Usize
    free_bytes: Usize
    gpu_memory_bytes: Usize | None
    cpu_memory_bytes: Usize | None
    cache_memory_bytes: Usize
    utilization_percent: F32

    def calculate_utilization(self) -> None:
        """Set utilization_percent to 100 * used / total, or 0 when total is 0.  [TY-METRICS-1]"""
        self.utilization_percent = 100.0 * self.used_bytes / self.total_bytes if self.total_bytes else 0.0


@dataclass(frozen=True, slots=True)
class EngineStatus(Record):
    """Snapshot of an engine."""

    is_ready: bool
    loaded_models: list[ModelId]
    active_requests: Usize
    queued_requests: Usize
    memory_usage: MemoryUsage
    uptime_seconds: U64
    last_heartbeat: datetime
    version: str


@dataclass(frozen=True, slots=True)
class SchedulerStats(Record):
    """Snapshot of a scheduler."""

    waiting_requests: Usize
    running_requests: Usize
    preempted_requests: Usize
    completed_requests: U64
    failed_requests: U64
    cancelled_requests: U64
    avg_wait_time_ms: F64
    avg_execution_time_ms: F64
    throughput_rps: F64
    queue_utilization: F32


@dataclass(frozen=True, slots=True)
class PrefixCacheStats(Record):
    """Snapshot of a prefix cache."""

    cached_prefixes: Usize
    prefix_hit_rate: F32
    avg_prefix_length: F32
    memory_saved_bytes: U64


@dataclass(frozen=True, slots=True)
class CacheStats(Record):
    """Snapshot of a key/value cache."""

    total_blocks: Usize
    used_blocks: Usize
    free_blocks: Usize
    cache_hit_rate: F32
    cache_hits: U64
    cache_misses: U64
    eviction_count: U64
    avg_block_utilization: F32
    prefix_cache_stats: PrefixCacheStats | None


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


class HealthStatusType(enum.Enum):
    """Level of health."""

    Healthy = "Healthy"
    Warning = "Warning"
    Unhealthy = "Unhealthy"


ComponentHealthStatus: TypeAlias = HealthStatusType


@dataclass(frozen=True, slots=True)
class ComponentHealth:
    """Health of one part."""

    status: HealthStatusType
    message: str
    metrics: dict[str, F64]
    last_check: datetime

    @staticmethod
    def healthy(component: str, *, last_check: datetime | None = None) -> ComponentHealth:
        """Healthy, with the message "<component> healthy".  [TY-METRICS-2]"""
        return ComponentHealth(HealthStatusType.Healthy, f"{component} healthy", {}, last_check or datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class ComponentStatus:
    """Health of the six parts of an engine."""

    scheduler: ComponentHealth
    model_executor: ComponentHealth
    tokenizer: ComponentHealth
    kv_cache: ComponentHealth
    memory_manager: ComponentHealth
    backend: ComponentHealth

    @staticmethod
    def healthy(*, last_check: datetime | None = None) -> ComponentStatus:
        """All healthy; the messages name scheduler, model, tokenizer, kv_cache, memory and backend.  [TY-METRICS-2]"""
        when = last_check or datetime.now(UTC)
        names = ("scheduler", "model", "tokenizer", "kv_cache", "memory", "backend")
        return ComponentStatus(*(ComponentHealth.healthy(name, last_check=when) for name in names))

    def entries(
        self,
    ) -> tuple[ComponentHealth, ComponentHealth, ComponentHealth, ComponentHealth, ComponentHealth, ComponentHealth]:
        """The six in declaration order.  [TY-METRICS-3]"""
        return (
            self.scheduler, self.model_executor, self.tokenizer, self.kv_cache, self.memory_manager, self.backend,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """Health of an engine."""

    status: HealthStatusType
    component_status: ComponentStatus
    last_check: datetime

    @staticmethod
    def healthy(*, last_check: datetime | None = None) -> HealthStatus:
        """Everything healthy.  [TY-METRICS-2]"""
        when = last_check or datetime.now(UTC)
        return HealthStatus(HealthStatusType.Healthy, ComponentStatus.healthy(last_check=when), when)
