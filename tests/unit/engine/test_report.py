"""Status, metrics and health of an engine against what was done with it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.engine.counters import EngineCounters, percentile
from ferrum_ref.errors import BackendError
from ferrum_ref.types.config import EngineConfig, SchedulerConfig
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.metrics import HealthStatusType


@pytest.mark.clause("EN-STATUS-1", "EN-METRICS-1")
def test_counts_while_running_and_after(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup(max_num_seqs=2, next_token=lambda history: 97)
        async with setup.engine as engine:
            before = await engine.status()
            assert (before.is_ready, before.active_requests, before.queued_requests) == (True, 0, 0)
            assert before.loaded_models == [ModelId("bytes")]
            setup.executor.gate.clear()
            tasks = [asyncio.create_task(engine.infer(tools.request(p, max_tokens=9))) for p in "abcde"]
            await setup.until_held()
            during = await engine.status()
            assert during.active_requests + during.queued_requests == 5
            assert during.active_requests in (1, 2)
            assert engine.metrics().queue_metrics.current_queue_length == during.queued_requests
            assert engine.metrics().resource_utilization.memory_utilization > 0
            setup.executor.gate.set()
            await asyncio.gather(*tasks)
            await setup.require_clean()
            metrics = engine.metrics()
            assert (metrics.total_requests, metrics.successful_requests) == (5, 5)
            assert metrics.tokens_per_second / metrics.throughput_rps == pytest.approx(9)
            assert (
                0 < metrics.avg_request_latency_ms <= metrics.p95_request_latency_ms <= metrics.p99_request_latency_ms
            )
            parts = metrics.performance_breakdown
            assert min(parts.model_execution_time_ms, parts.sampling_time_ms, parts.scheduling_time_ms) > 0
            assert metrics.error_stats.total_errors == 0
            assert engine.config() == EngineConfig()

    tools.run(main())


@pytest.mark.clause("EN-STATUS-1")
def test_uptime_is_the_clocks(tools: Any) -> None:
    clock = itertools.count(1_000_000, 10)

    async def main() -> None:
        setup = tools.Setup(clock=lambda: float(next(clock)))
        status = await setup.engine.status()
        assert status.uptime_seconds == 10
        assert status.last_heartbeat.timestamp() == 1_000_020
        await setup.engine.shutdown()

    tools.run(main())


@pytest.mark.clause("EN-STATUS-2", "EN-STATUS-3")
def test_health_is_that_of_the_worst_part(tools: Any) -> None:
    async def main() -> None:
        config = EngineConfig(scheduler=SchedulerConfig(max_waiting_requests=3))
        setup = tools.Setup(num_blocks=8, config=config, max_num_seqs=1)
        async with setup.engine as engine:
            assert (await engine.health_check()).status is HealthStatusType.Healthy
            setup.executor.gate.clear()
            tasks = [asyncio.create_task(engine.infer(tools.request("a" * 29)))]
            await setup.until_held()
            tasks += [asyncio.create_task(engine.infer(tools.request(p * 29))) for p in "bcd"]
            await asyncio.sleep(0)
            health = await engine.health_check()
            assert health.status is HealthStatusType.Warning
            assert "3 of 3" in health.component_status.scheduler.message
            assert health.component_status.kv_cache.metrics["total_blocks"] == 8
            assert "8 of 8" in health.component_status.kv_cache.message
            setup.executor.gate.set()
            await asyncio.gather(*tasks)
            await setup.require_clean()
            setup.kv_cache.pool.ref_counts[0] += 1  # break the books
            health = await engine.health_check()
            assert health.status is HealthStatusType.Unhealthy
            assert health.component_status.scheduler.status is HealthStatusType.Unhealthy
            setup.kv_cache.pool.ref_counts[0] -= 1

    tools.run(main())


@pytest.mark.clause("EN-METRICS-2")
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.sampled_from([0.5, 0.95, 0.99]))
def test_percentiles_are_those_of_numpys_inverted_cdf(values: list[float], fraction: float) -> None:
    assert percentile(values, fraction) == np.quantile(values, fraction, method="inverted_cdf")
    assert percentile([], fraction) == 0.0


@pytest.mark.clause("EN-METRICS-2", "EN-METRICS-3")
def test_latencies_are_of_the_last_thousand_and_errors_by_kind() -> None:
    counters = EngineCounters()
    for latency in [1e6] * 5 + [0.001] * 1000:
        counters.answered(latency)
    for i in range(30):
        counters.failed(BackendError(str(i)), None, when=None)  # type: ignore[arg-type]
    counters.num_accepted = 60
    metrics = counters.metrics(100.0, 0, 0.0)
    assert metrics.p99_request_latency_ms == 1.0
    assert metrics.successful_requests == 1005
    assert metrics.throughput_rps == pytest.approx(10.05)
    assert metrics.error_stats.errors_by_type == {"Backend": 30}
    assert [e.message for e in metrics.error_stats.recent_errors] == [str(i) for i in range(10, 30)]
    assert metrics.error_stats.error_rate == 0.5
    assert EngineCounters().metrics(0.0, 0, 0.0).throughput_rps == 0.0
