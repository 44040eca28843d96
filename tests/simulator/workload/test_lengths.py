"""Length distributions: support, moments, domains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from ferrum_sim.workload.lengths import LengthDistribution
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError


@pytest.mark.clause("SI-LENGTH-1")
def test_fixed_lengths_are_all_the_same() -> None:
    drawn = LengthDistribution.parse("fixed:128").draw(50, np.random.default_rng(0))
    assert set(drawn.tolist()) == {128}


@pytest.mark.clause("SI-LENGTH-1")
def test_uniform_lengths_are_equally_likely_on_both_ends() -> None:
    drawn = LengthDistribution.parse("uniform:3,7").draw(50_000, np.random.default_rng(5))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6, 7]
    assert scipy.stats.chisquare(counts).pvalue > 0.01


@pytest.mark.clause("SI-LENGTH-1")
def test_lognormal_lengths_have_the_stated_median_and_spread() -> None:
    drawn = LengthDistribution.parse("lognormal:1000,0.8").draw(100_000, np.random.default_rng(7))
    logs = np.log(drawn)
    assert abs(logs.mean() - math.log(1000)) < 3 * 0.8 / math.sqrt(100_000)
    assert abs(logs.std() - 0.8) < 3 * 0.8 / math.sqrt(200_000)


@pytest.mark.clause("SI-LENGTH-1")
def test_lognormal_lengths_stop_at_the_maximum() -> None:
    drawn = LengthDistribution.parse("lognormal:100,2,150").draw(5_000, np.random.default_rng(7))
    assert drawn.max() == 150
    assert drawn.min() >= 1


@pytest.mark.clause("SI-LENGTH-2")
def test_empirical_lengths_come_from_the_sample_in_its_proportions() -> None:
    sample = (10, 10, 10, 500)
    drawn = LengthDistribution.empirical(sample).draw(40_000, np.random.default_rng(1))
    assert set(drawn.tolist()) == {10, 500}
    assert abs(np.mean(drawn == 500) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 40_000)
    with pytest.raises(InvalidParameterError, match="empirical"):
        LengthDistribution.empirical(())


@pytest.mark.clause("SI-LENGTH-1")
@given(
    st.sampled_from(["fixed:1", "uniform:1,9", "lognormal:1,3", "lognormal:5,0.1,6"]),
    st.integers(0, 2**32),
    st.integers(0, 40),
)
def test_every_length_is_a_positive_whole_number(text: str, seed: int, num_requests: int) -> None:
    drawn = LengthDistribution.parse(text).draw(num_requests, np.random.default_rng(seed))
    assert drawn.shape == (num_requests,)
    assert drawn.dtype == np.int64
    assert (drawn >= 1).all()


@pytest.mark.clause("SI-LENGTH-1", "SI-WORKLOAD-4")
@pytest.mark.parametrize(
    "text",
    ["", "fixed", "fixed:0", "fixed:1.5", "fixed:-3", "uniform:5", "uniform:7,3", "uniform:0,3", "lognormal:0,1",
     "lognormal:100,-1", "lognormal:100,1,0", "lognormal:100,1,200,3", "fixed:1e30", "normal:3,4", "fixed:many"],
)  # fmt: skip
def test_bad_length_text_is_one_named_error(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="length distribution"):
        LengthDistribution.parse(text)
