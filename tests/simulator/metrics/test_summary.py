"""Every figure of a summary by hand, on a run small enough to do so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from ferrum_sim.cost_model.affine import AffineCost
from ferrum_sim.metrics.records import RequestRecord, RunRecord, StepLog
from ferrum_sim.metrics.requests import request_columns
from ferrum_sim.metrics.summary import SummaryOptions, summarise
from ferrum_sim.settings import EngineSettings
from ferrum_sim.simulation import simulate
from ferrum_sim.workload.request import Workload, unshared_requests

from ferrum_ref.errors import InvalidParameterError


@pytest.fixture(scope="module")
def run() -> RunRecord:
    """Steps of 1 s, 8 blocks of 4 tokens. Request 0 (4 in, 3 out) arrives at 0, request 1 (5 in, 1 out) at 4, request 2
    (40 in: more than the pool) at 4.5, and the clock stands idle from 3 to 4.

    [0,1] prompt 0 (1 block held), [1,2] and [2,3] decode (2 blocks), [4,5] prompt 1 (2 blocks)."""
    rows = ((0.0, 4, 3), (4.0, 5, 1), (4.5, 40, 1))
    return simulate(Workload(tuple(unshared_requests(rows)), "by hand"), EngineSettings(8, 4), AffineCost(step_s=1.0))


def summary_of(run: RunRecord, **options: float) -> dict[str, Any]:
    return summarise(run, SummaryOptions(**options))  # type: ignore[arg-type]


@pytest.mark.clause("SI-METRIC-2")
def test_request_columns(run: RunRecord) -> None:
    columns = request_columns(run.records)
    assert columns["status"].tolist() == ["finished", "finished", "rejected"]
    assert columns["ttft_s"].tolist()[:2] == [1.0, 1.0]
    assert columns["e2e_s"].tolist()[:2] == [3.0, 1.0]
    assert columns["queue_time_s"].tolist()[:2] == [0.0, 0.0]
    assert columns["tpot_s"][0] == 1.0
    assert math.isnan(columns["tpot_s"][1])
    assert math.isnan(columns["e2e_s"][2])
    assert columns["max_itl_s"][0] == 1.0


@pytest.mark.clause("SI-METRIC-3")
def test_latencies_and_throughput(run: RunRecord) -> None:
    summary = summary_of(run)
    assert summary["requests"] == {
        "submitted": 3, "finished": 2, "rejected": 1, "unfinished": 0, "preempted": 0, "preemptions": 0,
    }  # fmt: skip
    e2e = summary["latency"]["e2e_s"]
    assert (e2e["count"], e2e["mean"], e2e["p50"], e2e["max"]) == (2, 2.0, 2.0, 3.0)
    assert e2e["p90"] == pytest.approx(2.8)
    assert e2e["mean_ci95_half_width"] is None
    assert summary["latency"]["tpot_s"]["count"] == 1
    assert summary["latency"]["itl_s"] == {
        "count": 2, "mean": 1.0, "p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0, "max": 1.0,
    }  # fmt: skip
    throughput = summary["throughput"]
    assert throughput["elapsed_s"] == 5.0
    assert throughput["requests_per_s"] == 2 / 5
    assert throughput["prompt_tokens_per_s"] == 9 / 5
    assert throughput["output_tokens_per_s"] == 4 / 5
    assert throughput["total_tokens_per_s"] == 13 / 5


@pytest.mark.clause("SI-METRIC-4")
def test_kv_cache_and_engine_are_weighted_with_time(run: RunRecord) -> None:
    summary = summary_of(run)
    assert summary["kv_cache"]["mean_use"] == (1 + 2 + 2 + 2) / (5 * 8)
    assert summary["kv_cache"]["max_use"] == 2 / 8
    assert summary["kv_cache"]["prefix_hit_rate"] == 0.0
    engine = summary["engine"]
    assert (engine["num_steps"], engine["busy_fraction"], engine["mean_step_s"]) == (4, 4 / 5, 1.0)
    assert engine["computed_tokens"] == 4 + 1 + 1 + 5
    assert engine["mean_sequences_per_step"] == 1.0
    assert engine["mean_new_tokens_per_step"] == 11 / 4


@pytest.mark.clause("SI-METRIC-5")
def test_goodput_counts_rejected_requests_against_the_engine(run: RunRecord) -> None:
    assert summary_of(run)["goodput"]["fraction_of_submitted"] == 2 / 3
    strict = summary_of(run, slo_ttft_s=1.0, slo_tpot_s=0.5)["goodput"]
    assert (strict["requests_met"], strict["fraction_of_submitted"], strict["requests_per_s"]) == (1, 1 / 3, 1 / 5)
    assert summary_of(run, slo_ttft_s=0.5)["goodput"]["requests_met"] == 0
    assert summary_of(run, slo_ttft_s=1.0, slo_tpot_s=1.0)["goodput"]["requests_met"] == 2


@pytest.mark.clause("SI-STAT-3")
def test_warm_up_leaves_out_what_arrives_before_it(run: RunRecord) -> None:
    summary = summary_of(run, warmup_s=3.5)
    assert summary["warm_up"] == {"seconds": 3.5, "requests_left_out": 1}
    assert summary["requests"]["submitted"] == 2
    assert summary["latency"]["e2e_s"]["mean"] == 1.0
    assert summary["latency"]["itl_s"]["count"] == 0
    assert summary["throughput"]["elapsed_s"] == 1.5
    assert summary["engine"]["num_steps"] == 1
    assert summary["kv_cache"]["mean_use"] == 2 / (1.5 * 8)


@pytest.mark.clause("SI-LAW-3", "SI-METRIC-3")
def test_littles_law_notices_a_lost_request(run: RunRecord) -> None:
    assert summary_of(run)["littles_law"] == {
        "request_seconds_by_steps": 4.0, "request_seconds_by_requests": 4.0, "relative_gap": 0.0,
    }  # fmt: skip
    lossy = RunRecord(run.records[1:], run.steps, run.num_blocks, run.block_size)
    assert summary_of(lossy)["littles_law"]["relative_gap"] == 3.0


@pytest.mark.clause("SI-METRIC-3", "SI-REPORT-2")
def test_a_run_of_nothing_has_no_figures_and_no_nan() -> None:
    rows = ((1.0, 100, 1),)
    run = simulate(Workload(tuple(unshared_requests(rows)), "all refused"), EngineSettings(2, 4), AffineCost())
    summary = summary_of(run)
    assert summary["latency"]["ttft_s"]["mean"] is None
    assert summary["throughput"]["requests_per_s"] is None
    assert summary["goodput"]["fraction_of_submitted"] == 0.0
    json.dumps(summary, allow_nan=False)


@pytest.mark.clause("SI-METRIC-6")
def test_gap_percentiles_are_order_statistics_of_the_expanded_sample() -> None:
    rng = np.random.default_rng(2)
    steps = StepLog()
    sample: list[float] = []
    for end_s in range(1, 40):
        gap_s, count = float(rng.integers(1, 9)), int(rng.integers(1, 5))
        steps.add_gap(gap_s, float(end_s), count)
        sample += [gap_s] * count
    figures = summarise(RunRecord((), steps, 1, 1), SummaryOptions())["latency"]["itl_s"]
    for percent in (50, 90, 95, 99):
        assert figures[f"p{percent}"] == np.percentile(sample, percent, method="inverted_cdf")
    assert (figures["count"], figures["max"]) == (len(sample), max(sample))
    assert figures["mean"] == pytest.approx(np.mean(sample))


@pytest.mark.clause("SI-METRIC-5", "SI-STAT-3")
@pytest.mark.parametrize("bad", [{"slo_ttft_s": 0.0}, {"slo_tpot_s": -1.0}, {"warmup_s": -1.0}, {"warmup_s": math.inf}])
def test_absurd_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidParameterError, match=next(iter(bad))):
        SummaryOptions(**bad)  # type: ignore[arg-type]


@pytest.mark.clause("SI-METRIC-7")
def test_the_digest_sees_every_bit(run: RunRecord) -> None:
    same = RunRecord(run.records, run.steps, run.num_blocks, run.block_size)
    assert same.digest() == run.digest()
    records = (RequestRecord(run.records[0].request, finish_s=math.nextafter(3.0, 4.0)), *run.records[1:])
    assert RunRecord(records, run.steps, run.num_blocks, run.block_size).digest() != run.digest()
