"""What a diagnosis of an engine contains; `ferrum_ref.types.metrics` re-exports these names.

Clause: TY-METRICS-4 (specs/types.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime

from ferrum_ref.types.config import EngineConfig
from ferrum_ref.types.devices import Device
from ferrum_ref.types.metrics.totals import EngineMetrics
from ferrum_ref.types.record import F32, U64, Json, Record, Usize


class TrendDirection(enum.Enum):
    """Where a quantity is going."""

    Improving = "Improving"
    Stable = "Stable"
    Degrading = "Degrading"
    Volatile = "Volatile"


@dataclass(frozen=True, slots=True)
class PerformanceBottleneck:
    """One finding; severity and impact run 0-1."""

    bottleneck_type: str
    severity: F32
    description: str
    performance_impact: F32


@dataclass(frozen=True, slots=True)
class PerformanceRecommendation:
    """One piece of advice; expected impact and complexity run 0-1."""

    category: str
    description: str
    expected_impact: F32
    complexity: F32


@dataclass(frozen=True, slots=True)
class PerformanceTrends:
    """Where things are going; stable at first."""

    latency_trend: TrendDirection = TrendDirection.Stable
    throughput_trend: TrendDirection = TrendDirection.Stable
    error_rate_trend: TrendDirection = TrendDirection.Stable
    resource_utilization_trend: TrendDirection = TrendDirection.Stable


@dataclass(frozen=True, slots=True)
class PerformanceAnalysis:
    """Findings, advice and trends."""

    bottlenecks: list[PerformanceBottleneck] = field(default_factory=list)
    recommendations: list[PerformanceRecommendation] = field(default_factory=list)
    trends: PerformanceTrends = field(default_factory=PerformanceTrends)


@dataclass(frozen=True, slots=True)
class AllocationInfo(Record):
    """One large allocation, in bytes."""

    size: U64
    allocation_type: str
    timestamp: datetime


@dataclass(frozen=True, slots=True)
class GpuMemoryDetails(Record):
    """What fills a GPU, in bytes."""

    total_memory: U64 = 0
    used_memory: U64 = 0
    memory_by_type: dict[str, U64] = field(default_factory=dict)
    large_allocations: list[AllocationInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class NetworkIODetails(Record):
    """Network traffic and connections."""

    bytes_received_per_sec: U64 = 0
    bytes_sent_per_sec: U64 = 0
    connection_count: Usize = 0
    request_rate_per_sec: F32 = 0.0


@dataclass(frozen=True, slots=True)
class DetailedResourceUsage:
    """Who uses what: bytes by component, percent of a CPU by thread."""

    memory_by_component: dict[str, U64] = field(default_factory=dict)
    cpu_by_thread: dict[str, F32] = field(default_factory=dict)
    gpu_memory_details: GpuMemoryDetails | None = None
    network_io_details: NetworkIODetails = field(default_factory=NetworkIODetails)


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """Facts about the build."""

    build_timestamp: str = ""
    git_commit: str | None = None
    build_config: str = ""
    compiler_flags: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """Facts about the runtime; `rust_version` holds the interpreter's version here."""

    rust_version: str = ""
    engine_version: str = ""
    build_info: BuildInfo = field(default_factory=BuildInfo)
    feature_flags: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SystemInfo(Record):
    """Facts about the host; `total_memory` in bytes."""

    os: str = ""
    cpu_info: str = ""
    total_memory: U64 = 0
    devices: list[Device] = field(default_factory=list)
    runtime_info: RuntimeInfo = field(default_factory=RuntimeInfo)


@dataclass(frozen=True, slots=True)
class DiagnosticsReport:
    """Everything that is known about an engine, for a report."""

    config_snapshot: EngineConfig
    current_metrics: EngineMetrics
    resource_usage: DetailedResourceUsage
    performance_analysis: PerformanceAnalysis
    component_diagnostics: dict[str, Json]
    system_info: SystemInfo
