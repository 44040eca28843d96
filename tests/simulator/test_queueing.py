"""Queueing theory: with one slot and a cost that is the work itself, the engine is a single-server FCFS queue.

Means are compared with their closed forms inside 95 % intervals over independent replications; every single path is
compared with Lindley's recursion, W' = max(0, W + S - A), which has no randomness left in it.
Source: Kleinrock, Queueing Systems 1, sections 3.2 and 5.7; Lindley 1952.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from ferrum_sim.cost_model.affine import AffineCost
from ferrum_sim.metrics.requests import request_columns
from ferrum_sim.metrics.summary import littles_law
from ferrum_sim.settings import EngineSettings
from ferrum_sim.simulation import simulate
from ferrum_sim.workload.arrivals import ArrivalProcess
from ferrum_sim.workload.request import Workload, unshared_requests
from numpy.typing import NDArray

MEAN_WORK_TOKENS = 50
ONE_SLOT = EngineSettings(4096, 16, max_num_batched_tokens=65536, max_num_seqs=1, prefix_caching=False)
Floats = NDArray[np.float64]


def waiting_times(load: float, service: str, num_requests: int, seed: int) -> tuple[Floats, Floats]:
    """(waiting times, services) of one path; the mean service is 1 s.

    "fixed": one prefill step of as many tokens as every prompt has. "prompt": exponential work as the length of the
    prompt, one step. "output": exponential work as the number of generated tokens, many steps in stretches.
    """
    rng = np.random.default_rng([seed, int(load * 1000)])
    arrivals_s = ArrivalProcess("poisson", load).arrivals_s(num_requests, rng)
    work = np.full(num_requests, MEAN_WORK_TOKENS)
    if service != "fixed":
        # The ceiling of an exponential is geometric: an exponential on a grid of 1/50 of its mean.
        rate = -math.log1p(-1.0 / MEAN_WORK_TOKENS)
        work = np.ceil(rng.exponential(1.0 / rate, num_requests)).astype(int)
    ones = np.ones(num_requests, dtype=int)
    prompts, outputs = (ones, work) if service == "output" else (work, ones)
    rows = zip(arrivals_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    run = simulate(
        Workload(tuple(unshared_requests(rows)), "queue"), ONE_SLOT, AffineCost(token_s=1.0 / MEAN_WORK_TOKENS)
    )
    columns = request_columns(run.records)
    assert set(columns["status"].tolist()) == {"finished"}
    assert littles_law(run)["relative_gap"] < 1e-9
    services_s = work / MEAN_WORK_TOKENS
    lindley_s = lindley(columns["arrival_s"], services_s)
    np.testing.assert_allclose(columns["queue_time_s"], lindley_s, rtol=0, atol=1e-9 * columns["finish_s"].max())
    return columns["queue_time_s"], services_s


def lindley(arrivals_s: Floats, services_s: Floats) -> Floats:
    waits = np.zeros(len(arrivals_s))
    gaps_s = np.diff(arrivals_s)
    for index in range(1, len(waits)):
        waits[index] = max(0.0, waits[index - 1] + services_s[index - 1] - gaps_s[index - 1])
    return waits


def mean_wait(load: float, service: str) -> float:
    """Pollaczek-Khinchine: W = rate E[S^2] / (2 (1 - load)), with E[S] = 1."""
    variance = 0.0 if service == "fixed" else 1.0 - 1.0 / MEAN_WORK_TOKENS  # geometric on the grid: (1 - p)/p^2 p^2
    return load * (1.0 + variance) / (2.0 * (1.0 - load))


def check_mean(
    load: float, service: str, num_replications: int, num_requests: int, num_warmup: int, level: float = 0.95
) -> None:
    means = [
        float(waiting_times(load, service, num_requests, seed)[0][num_warmup:].mean())
        for seed in range(num_replications)
    ]
    centre = float(np.mean(means))
    half_width = (
        scipy.stats.t.ppf(0.5 + level / 2, num_replications - 1) * np.std(means, ddof=1) / math.sqrt(num_replications)
    )
    assert abs(centre - mean_wait(load, service)) <= half_width


@pytest.mark.clause("SI-LAW-5")
@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("service", ["fixed", "prompt", "output"])
def test_the_mean_wait_is_that_of_md1_and_mm1(service: str, load: float) -> None:
    """fixed: M/D/1; prompt and output: M/M/1 (on a grid)."""
    check_mean(load, service, num_replications=6, num_requests=1000, num_warmup=250)


@pytest.mark.clause("SI-LAW-5")
def test_the_closed_forms_are_the_known_ones() -> None:
    """M/D/1 at 0.5 waits half a service, at 0.8 two; M/M/1 one and four (less the grid's 1 %)."""
    assert mean_wait(0.5, "fixed") == 0.5
    assert mean_wait(0.8, "fixed") == pytest.approx(2.0)
    assert mean_wait(0.5, "output") == pytest.approx(1.0, rel=0.011)
    assert mean_wait(0.8, "output") == pytest.approx(4.0, rel=0.011)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.clause("SI-LAW-5")
@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("service", ["fixed", "prompt", "output"])
def test_the_mean_wait_over_all_loads(service: str, load: float) -> None:
    """Twelve intervals that hold jointly at 95 %."""
    check_mean(load, service, num_replications=20, num_requests=5000, num_warmup=1500, level=1 - 0.05 / 12)
