"""What engines, schedulers and caches report about themselves.

Percent fields run 0-100; rate, ratio and utilisation fields run 0-1. Everything here is plain data.
Upstream: `ferrum_types::metrics`.  Clauses: TY-METRICS-1..4 (specs/types.md).
"""

from ferrum_ref.types.metrics.diagnostics import (
    AllocationInfo,
    BuildInfo,
    DetailedResourceUsage,
    DiagnosticsReport,
    GpuMemoryDetails,
    NetworkIODetails,
    PerformanceAnalysis,
    PerformanceBottleneck,
    PerformanceRecommendation,
    PerformanceTrends,
    RuntimeInfo,
    SystemInfo,
    TrendDirection,
)
from ferrum_ref.types.metrics.engine_state import (
    EngineRequestProgress,
    EngineRequestState,
    EngineState,
    HardwareConstraints,
    LatencyRequirements,
    RequestCharacteristics,
    SpeculationConfig,
    WarmupResult,
)
from ferrum_ref.types.metrics.health import (
    ComponentHealth,
    ComponentHealthStatus,
    ComponentStatus,
    HealthStatus,
    HealthStatusType,
)
from ferrum_ref.types.metrics.host import DiskMetrics, GpuMetrics, NetworkMetrics, SystemMetrics
from ferrum_ref.types.metrics.serving import (
    BatchingMetrics,
    LatencyMetrics,
    ModelMetrics,
    PhaseMetrics,
    RequestMetrics,
    ThroughputMetrics,
)
from ferrum_ref.types.metrics.status import CacheStats, EngineStatus, MemoryUsage, PrefixCacheStats, SchedulerStats
from ferrum_ref.types.metrics.totals import (
    EngineMetrics,
    ErrorEvent,
    ErrorStats,
    PerformanceBreakdown,
    QueueMetrics,
    ResourceMetrics,
)

__all__ = [
    "AllocationInfo",
    "BatchingMetrics",
    "BuildInfo",
    "CacheStats",
    "ComponentHealth",
    "ComponentHealthStatus",
    "ComponentStatus",
    "DetailedResourceUsage",
    "DiagnosticsReport",
    "DiskMetrics",
    "EngineMetrics",
    "EngineRequestProgress",
    "EngineRequestState",
    "EngineState",
    "EngineStatus",
    "ErrorEvent",
    "ErrorStats",
    "GpuMemoryDetails",
    "GpuMetrics",
    "HardwareConstraints",
    "HealthStatus",
    "HealthStatusType",
    "LatencyMetrics",
    "LatencyRequirements",
    "MemoryUsage",
    "ModelMetrics",
    "NetworkIODetails",
    "NetworkMetrics",
    "PerformanceAnalysis",
    "PerformanceBottleneck",
    "PerformanceBreakdown",
    "PerformanceRecommendation",
    "PerformanceTrends",
    "PhaseMetrics",
    "PrefixCacheStats",
    "QueueMetrics",
    "RequestCharacteristics",
    "RequestMetrics",
    "ResourceMetrics",
    "RuntimeInfo",
    "SchedulerStats",
    "SpeculationConfig",
    "SystemInfo",
    "SystemMetrics",
    "ThroughputMetrics",
    "TrendDirection",
    "WarmupResult",
]
