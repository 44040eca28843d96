"""What engines report about themselves."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest

from ferrum_ref.types.metrics import (
    DetailedResourceUsage,
    EngineMetrics,
    EngineRequestProgress,
    HardwareConstraints,
    HealthStatus,
    HealthStatusType,
    LatencyMetrics,
    MemoryUsage,
    PerformanceAnalysis,
    SpeculationConfig,
    SystemInfo,
    TrendDirection,
    WarmupResult,
)

WHEN = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.clause("TY-METRICS-1")
def test_utilisation_is_a_percentage_and_zero_for_no_memory() -> None:
    usage = MemoryUsage(400, 100, 300, None, 100, 50, 0.0)
    usage.calculate_utilization()
    assert usage.utilization_percent == 25.0
    nothing = MemoryUsage(0, 0, 0, None, None, 0, 99.0)
    nothing.calculate_utilization()
    assert nothing.utilization_percent == 0.0


@pytest.mark.clause("TY-METRICS-2", "TY-METRICS-3")
def test_a_healthy_engine() -> None:
    health = HealthStatus.healthy(last_check=WHEN)
    entries = health.component_status.entries()
    names = ["scheduler", "model", "tokenizer", "kv_cache", "memory", "backend"]
    assert [e.message for e in entries] == [f"{name} healthy" for name in names]
    assert {e.status for e in entries} | {health.status} == {HealthStatusType.Healthy}
    assert {e.last_check for e in entries} | {health.last_check} == {WHEN}
    assert entries[3] is health.component_status.kv_cache
    assert HealthStatus.healthy().last_check.tzinfo is UTC


@pytest.mark.clause("TY-METRICS-4")
def test_metrics_start_at_zero() -> None:
    metrics = EngineMetrics()
    assert (metrics.total_requests, metrics.queue_metrics.current_queue_length) == (0, 0)
    assert metrics.error_stats.recent_errors == []


@pytest.mark.clause("TY-METRICS-4")
def test_what_starts_empty() -> None:
    assert WarmupResult() == WarmupResult(0, 0, 0.0, 0, False, [])
    trends = PerformanceAnalysis().trends
    assert set(dataclasses.astuple(trends)) == {TrendDirection.Stable}
    usage = DetailedResourceUsage()
    assert (usage.memory_by_component, usage.gpu_memory_details) == ({}, None)
    assert usage.network_io_details.connection_count == 0
    assert usage.memory_by_component is not DetailedResourceUsage().memory_by_component
    assert SystemInfo().runtime_info.build_info.git_commit is None
    assert EngineRequestProgress().estimated_remaining_ms is None
    for needy in (LatencyMetrics, HardwareConstraints, SpeculationConfig):
        with pytest.raises(TypeError, match="required positional"):
            needy()
