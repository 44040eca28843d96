"""Arrival processes against their closed forms, judged by scipy's distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from ferrum_sim.workload.arrivals import ArrivalProcess

from ferrum_ref.errors import InvalidParameterError

NUM_DRAWS = 200_000
RATE = 5.0
# (text, the gap's distribution by scipy, its variance in closed form)
LAWS = [
    ("poisson:5", scipy.stats.expon(scale=1 / RATE), 1 / RATE**2),
    ("gamma:5,2", scipy.stats.gamma(a=0.25, scale=4 / RATE), (2 / RATE) ** 2),
    ("gamma:5,0.5", scipy.stats.gamma(a=4, scale=0.25 / RATE), (0.5 / RATE) ** 2),
    (
        "weibull:5,0.7",
        scipy.stats.weibull_min(0.7, scale=1 / (RATE * math.gamma(1 + 1 / 0.7))),
        (math.gamma(1 + 2 / 0.7) / math.gamma(1 + 1 / 0.7) ** 2 - 1) / RATE**2,
    ),
]


@pytest.mark.clause("SI-ARRIVAL-1", "SI-ARRIVAL-3")
@pytest.mark.parametrize(("text", "law", "variance"), LAWS, ids=[law[0] for law in LAWS])
def test_gaps_follow_the_stated_law(text: str, law: scipy.stats.rv_continuous, variance: float) -> None:
    gaps_s = ArrivalProcess.parse(text).gaps_s(NUM_DRAWS, np.random.default_rng(11))
    assert scipy.stats.kstest(gaps_s, law.cdf).pvalue > 0.01
    assert law.var() == pytest.approx(variance)
    standard_error = math.sqrt(variance / NUM_DRAWS)
    assert abs(gaps_s.mean() - 1 / RATE) < 3 * standard_error
    fourth = law.moment(4) - 4 * law.moment(3) * law.mean() + 6 * law.moment(2) * law.mean() ** 2 - 3 * law.mean() ** 4
    assert abs(gaps_s.var() - variance) < 3 * math.sqrt((fourth - variance**2) / NUM_DRAWS)


@pytest.mark.clause("SI-ARRIVAL-1")
def test_poisson_counts_are_poisson() -> None:
    """Counts in windows of 2 s: mean and variance both rate * 2 s; a clipped process is under-dispersed."""
    arrivals_s = ArrivalProcess.parse("poisson:5").arrivals_s(NUM_DRAWS, np.random.default_rng(3))
    counts = np.bincount((arrivals_s / 2.0).astype(int))[:-1]
    dispersion = counts.var(ddof=1) / counts.mean()
    assert abs(dispersion - 1.0) < 3 * math.sqrt(2 / len(counts))


@pytest.mark.clause("SI-ARRIVAL-2")
def test_constant_arrivals_stand_at_multiples_of_the_gap() -> None:
    arrivals_s = ArrivalProcess.parse("constant:4").arrivals_s(8, np.random.default_rng(0))
    assert arrivals_s.tolist() == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


@pytest.mark.clause("SI-ARRIVAL-3", "SI-WORKLOAD-4")
@pytest.mark.parametrize(
    "text",
    ["", "poisson", "poisson:", "poisson:0", "poisson:-1", "poisson:nan", "poisson:inf", "poisson:1,2", "gamma:4",
     "gamma:4,0", "weibull:4,-1", "zipf:3", "poisson:fast", "poisson:1e999"],
)  # fmt: skip
def test_bad_arrival_text_is_one_named_error(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="arrival process") as caught:
        ArrivalProcess.parse(text)
    assert "expected" in str(caught.value) or "takes" in str(caught.value)
