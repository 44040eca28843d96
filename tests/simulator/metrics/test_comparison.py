"""Paired comparison: real differences are found, chance is not called a difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ferrum_sim.metrics.comparison import HIGHER, LOWER, PAIRED, UNCLEAR, compare_runs
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError

NUM_REQUESTS = 400


def columns(values: NDArray[np.float64], status: str = "finished") -> dict[str, NDArray[Any]]:
    return {
        "index": np.arange(len(values)),
        "num_prompt_tokens": np.full(len(values), 10),
        "num_output_tokens": np.full(len(values), 5),
        "status": np.full(len(values), status),
    } | dict.fromkeys(PAIRED, values)


@pytest.mark.clause("SI-STAT-2")
def test_a_small_shift_under_large_common_noise_is_real() -> None:
    """The noise (deviation 10) is common to both runs and cancels; the shift is 0.1."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 10, NUM_REQUESTS)
    shifted = common + 0.1 + rng.normal(0, 0.05, NUM_REQUESTS)
    up, down = compare_runs(columns(common), columns(shifted)), compare_runs(columns(shifted), columns(common))
    assert {difference.verdict for difference in up} == {HIGHER}
    assert {difference.verdict for difference in down} == {LOWER}
    assert up[0].difference.mean == pytest.approx(0.1, abs=0.01)
    assert up[0].num_pairs == NUM_REQUESTS


@pytest.mark.clause("SI-STAT-2")
def test_no_difference_is_claimed_more_often_than_stated() -> None:
    """300 comparisons of equal processes: the joint level is 95 %, so at most 5 % of them may claim anything."""
    rng = np.random.default_rng(4)
    false_alarms = 0
    for _ in range(300):
        left, right = rng.normal(0, 1, (2, NUM_REQUESTS))
        false_alarms += any(d.verdict != UNCLEAR for d in compare_runs(columns(left), columns(right), 3))
    assert false_alarms <= 0.05 * 300


@pytest.mark.clause("SI-STAT-2")
def test_equal_runs_do_not_differ_and_missing_figures_are_left_out() -> None:
    values = np.arange(float(NUM_REQUESTS))
    assert {d.verdict for d in compare_runs(columns(values), columns(values))} == {UNCLEAR}
    holes = values.copy()
    holes[::2] = np.nan
    assert compare_runs(columns(values), columns(holes))[0].num_pairs == NUM_REQUESTS // 2
    assert compare_runs(columns(values), columns(values, "rejected"))[0].num_pairs == 0


@pytest.mark.clause("SI-STAT-2")
def test_runs_of_different_workloads_are_refused() -> None:
    values = np.arange(100.0)
    longer = columns(values) | {"num_prompt_tokens": np.full(100, 11)}
    for other in (longer, columns(values[:50])):
        with pytest.raises(InvalidParameterError, match="different requests"):
            compare_runs(columns(values), other)
