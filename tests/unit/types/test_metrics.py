"""What engines report about themselves."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ferrum_ref.types.metrics import EngineMetrics, HealthStatus, HealthStatusType, MemoryUsage

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


def test_metrics_start_at_zero() -> None:
    metrics = EngineMetrics()
    assert (metrics.total_requests, metrics.queue_metrics.current_queue_length) == (0, 0)
    assert metrics.error_stats.recent_errors == []
