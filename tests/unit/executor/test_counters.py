"""Figures from a clock that the test holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.executor.counters import LATENCY_WINDOW, ExecutorCounters, nearest_rank


class Held:
    """A clock, and what is lent."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.used = 0
        self.counters = ExecutorCounters(lambda: self.now_s, 1000, lambda: self.used, max_batch_size=4)

    def run(self, num_prefills: int, num_decodes: int, seconds: float, num_tokens: int | None = None) -> None:
        with self.counters.timed(num_prefills, num_decodes, num_tokens):
            self.now_s += seconds


@pytest.mark.clause("MX-METRICS-1", "MX-METRICS-3", "MX-STATUS-2")
def test_latencies_are_whole_and_status_times_are_shares() -> None:
    held = Held()
    held.run(1, 0, 0.100, 30)
    held.run(0, 2, 0.010)
    held.run(1, 3, 0.040, 8)
    held.used = 250
    metrics, status = held.counters.metrics(), held.counters.status()
    assert (metrics.total_operations, metrics.prefill_operations, metrics.decode_operations) == (7, 2, 5)
    assert metrics.avg_prefill_latency == pytest.approx((100 + 40) / 2)
    assert metrics.avg_decode_latency == pytest.approx((2 * 10 + 3 * 40) / 5)
    assert status.avg_prefill_time_ms == pytest.approx((100 + 10) / 2)
    assert status.avg_decode_time_ms == pytest.approx((2 * 5 + 3 * 10) / 5)
    assert metrics.throughput_tps == pytest.approx((30 + 2 + 8) / 0.150)
    assert metrics.memory_efficiency == 0.25
    assert metrics.batch_utilization == pytest.approx((1 + 2 + 4) / 3 / 4)
    assert (metrics.p95_prefill_latency, metrics.p95_decode_latency) == (pytest.approx(100), pytest.approx(40))


@pytest.mark.clause("MX-METRICS-1", "MX-METRICS-3")
def test_nothing_measured_reads_zero_and_failures_count_nowhere() -> None:
    held = Held()
    empty = held.counters.metrics()
    with pytest.raises(ZeroDivisionError), held.counters.timed(1, 0):
        held.now_s += 1 / 0
    assert held.counters.metrics() == empty
    assert (empty.total_operations, empty.throughput_tps, empty.p95_decode_latency) == (0, 0.0, 0.0)
    assert held.counters.fastest_decode_batch() is None
    held.run(0, 9, 0.0)  # a clock too coarse to see it, more than the largest batch
    assert held.counters.metrics().throughput_tps == 0.0
    assert held.counters.metrics().batch_utilization == 1.0
    assert ExecutorCounters(lambda: 0.0, 0, lambda: 0).metrics().memory_efficiency == 0.0


@pytest.mark.clause("MX-METRICS-2")
def test_the_percentile_is_the_nearest_rank_of_the_last_ones() -> None:
    held = Held()
    for latency_ms in np.random.default_rng(0).permutation(np.arange(1, 101)):
        held.run(1, 0, latency_ms / 1000)
    assert held.counters.metrics().p95_prefill_latency == pytest.approx(95)
    for _ in range(LATENCY_WINDOW):
        held.run(1, 0, 0.001)
    assert held.counters.metrics().p95_prefill_latency == pytest.approx(1)


@pytest.mark.clause("MX-METRICS-2")
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_the_rank_is_numpys(values: list[int]) -> None:
    assert nearest_rank([float(v) for v in values], 0.95) == np.percentile(values, 95, method="inverted_cdf")


@pytest.mark.clause("MX-BATCH-5")
def test_only_forwards_of_decodes_alone_measure_a_batch_size() -> None:
    held = Held()
    held.run(1, 3, 0.001)
    assert held.counters.fastest_decode_batch() is None
    held.run(0, 1, 1.0)
    held.run(0, 4, 5.0)
    held.run(0, 4, 1.0)  # together 8 tokens in 6 s
    assert held.counters.fastest_decode_batch() == 4
    held.run(0, 4, 20.0)
    assert held.counters.fastest_decode_batch() == 1
