"""Batch means: the quantile against scipy, coverage by experiment on processes with a known mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from ferrum_sim.metrics.intervals import batch_means, student_t_quantile

from ferrum_ref.errors import InvalidParameterError


@pytest.mark.clause("SI-STAT-1")
@pytest.mark.parametrize("degrees", [1, 2, 5, 19, 29, 200])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995, 0.9995])
def test_student_quantiles_agree_with_scipy(probability: float, degrees: int) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=1e-9)


@pytest.mark.clause("SI-STAT-1")
def test_the_interval_by_hand() -> None:
    """Batches of two with means 1, 2, 3, 4 (the first value is in none): s = sqrt(5/3), t(0.975, 3) = 3.182446."""
    values = np.array([100.0, 0, 2, 1, 3, 2, 4, 3, 5])
    interval = batch_means(values, num_batches=4)
    assert interval.mean == pytest.approx(120 / 9)
    assert interval.half_width == pytest.approx(3.182446305 * math.sqrt(5 / 3) / 2, rel=1e-8)
    assert interval.lag_one == pytest.approx((-0.5 * -1.5 + 0.5 * -0.5 + 1.5 * 0.5) / 5)


@pytest.mark.clause("SI-STAT-1")
def test_coverage_on_an_autocorrelated_process_is_near_95_percent() -> None:
    """x_t = 0.8 x_{t-1} + noise around mean 3, 4000 values: 400 intervals; a naive one would cover about 48 %."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, 4000))
    paths = 3.0 + scipy.signal.lfilter([1.0], [1.0, -0.8], noise, axis=1)
    intervals = [batch_means(path) for path in paths]
    covered = sum(abs(interval.mean - 3.0) <= (interval.half_width or 0.0) for interval in intervals)
    low, high = scipy.stats.binom.interval(0.999, 400, 0.95)
    assert low <= covered <= high
    assert sum(interval.is_dependent for interval in intervals) < 60


@pytest.mark.clause("SI-STAT-1")
def test_batches_too_short_for_their_process_are_said_to_be_dependent() -> None:
    walk = np.cumsum(np.random.default_rng(1).standard_normal(2000))
    assert batch_means(walk).is_dependent


@pytest.mark.clause("SI-STAT-1")
def test_few_values_have_a_mean_but_no_interval() -> None:
    assert batch_means(np.arange(39.0)).half_width is None
    assert batch_means(np.arange(39.0)).mean == 19.0
    assert math.isnan(batch_means(np.array([])).mean)
    assert batch_means(np.full(40, 2.5)).half_width == 0.0
    for bad in ({"num_batches": 1}, {"confidence": 1.0}):
        with pytest.raises(InvalidParameterError, match="batch_means"):
            batch_means(np.arange(100.0), **bad)  # type: ignore[arg-type]
