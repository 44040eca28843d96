"""Samplers from their draws alone: bugs are rejected at alpha = 1e-9, honest ones are not.

How many draws: with one logit at ln(V - 1) and the others at 0, the scaled logits have variance (ln(V - 1))^2 / 4, so a
temperature wrong by a factor 1 + r shifts their mean by r ln(V - 1) sqrt(n) / 2 standard deviations of n draws. For
V = 1024, r = 0.02, n = 20,480 that is 9.9; the test rejects beyond about 6.8, so it misses one time in a thousand (the
exact test by seed, where the contract fixes the draw, misses none). An id expected 50 times is missing by chance with
probability exp(-50).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from ferrum_ref.parity.choices import ALPHA, Law, draw_tests

NUM_DRAWS = 20480
VOCABULARY = 1024


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def two_levels() -> Law:
    scores = np.zeros(VOCABULARY)
    scores[17] = math.log(VOCABULARY - 1)
    return Law(softmax(scores), scores)


def draws(p: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.searchsorted(np.cumsum(p), np.random.default_rng(seed).random(count) * p.sum(), side="right")


def worst(law: Law, drawn: np.ndarray) -> float:
    return max(draw_tests(law, drawn).values())


@pytest.mark.clause("PA-SAMPLE-3")
@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_a_temperature_wrong_by_two_percent_is_rejected(factor: float) -> None:
    law = two_levels()
    power = 0.02 * math.log(VOCABULARY - 1) / 2.0 * math.sqrt(NUM_DRAWS)
    assert power > scipy.stats.norm.isf(ALPHA / 6.0) + scipy.stats.norm.isf(1e-3)
    rejected = [worst(law, draws(softmax(law.scores / factor), NUM_DRAWS, seed)) > 1.0 for seed in range(30)]
    assert all(rejected)


@pytest.mark.clause("PA-SAMPLE-2")
def test_a_token_that_is_never_drawn_is_rejected_where_fifty_are_expected() -> None:
    num = 200
    law = Law(np.full(num, 1.0 / num), np.zeros(num))
    for seed in range(20):
        p = law.probabilities.copy()
        p[seed] = 0.0
        drawn = draws(p, 50 * num, seed)
        assert draw_tests(law, drawn)["token"] > 1.0
        assert np.bincount(drawn, minlength=num)[seed] == 0


@pytest.mark.clause("PA-SAMPLE-2")
@pytest.mark.parametrize("kept", [4, 6])
def test_an_off_by_one_top_k_is_rejected(kept: int) -> None:
    """k = 5 is asked for: the fifth must be there, the sixth must not."""
    scores = np.linspace(0.0, -1.0, 50)
    right = np.where(np.arange(50) < 5, softmax(scores), 0.0)
    wrong = np.where(np.arange(50) < kept, softmax(scores), 0.0)
    law = Law(right / right.sum(), scores)
    for seed in range(20):
        assert worst(law, draws(wrong, 400, seed)) > 1.0
        assert worst(law, draws(right, 400, seed)) <= 1.0


@pytest.mark.clause("PA-SAMPLE-2", "PA-SAMPLE-3", "PA-SAMPLE-4")
def test_honest_draws_are_never_rejected() -> None:
    """Honest runs over distributions of every shape: the largest statistic stays below its critical value."""
    rng = np.random.default_rng(5)
    largest = 0.0
    for seed in range(1500):
        num = int(rng.integers(1, 300))
        scores = rng.standard_normal(num) * rng.choice([0.0, 0.5, 2.0, 8.0])
        law = Law(softmax(scores), scores)
        largest = max(largest, worst(law, draws(law.probabilities, int(rng.integers(1, 3000)), seed)))
    law = two_levels()
    for seed in range(40):
        largest = max(largest, worst(law, draws(law.probabilities, NUM_DRAWS, seed)))
    assert 0.2 < largest < 1.0


@pytest.mark.clause("PA-SAMPLE-4")
def test_a_generator_of_few_numbers_fails_the_chi_square() -> None:
    num = 300
    law = Law(np.full(num, 1.0 / num), np.zeros(num))
    coarse = np.floor(np.random.default_rng(0).random(20000) * 256) / 256
    drawn = np.searchsorted(np.cumsum(law.probabilities), coarse, side="right")
    assert draw_tests(law, drawn)["chi-square"] > 1.0


@pytest.mark.clause("PA-SAMPLE-4")
def test_the_chi_square_is_scipys() -> None:
    rng = np.random.default_rng(8)
    scores = rng.standard_normal(40)
    law, level = Law(softmax(scores), scores), math.log(3.0 / ALPHA)
    drawn = draws(law.probabilities, 20000, 3)
    counts = np.bincount(drawn, minlength=40)
    assert (20000 * law.probabilities).min() > 10
    wanted = scipy.stats.chisquare(counts, 20000 * law.probabilities).statistic
    critical = 39 + 2.0 * math.sqrt(39 * level) + 2.0 * level
    assert draw_tests(law, drawn)["chi-square"] == pytest.approx(wanted / critical, rel=1e-9)


@pytest.mark.clause("PA-SAMPLE-2", "PA-SAMPLE-4")
def test_the_critical_values_are_beyond_the_exact_quantiles() -> None:
    """The inequalities promise more than the quantiles of the limiting distributions, and not absurdly more."""
    level = math.log(3.0 / ALPHA)
    for freedom in (1, 10, 100, 1000):
        critical = freedom + 2.0 * math.sqrt(freedom * level) + 2.0 * level
        exact = scipy.stats.chi2.isf(ALPHA / 3.0, freedom)
        assert exact <= critical <= 1.5 * exact
    num, count = 50, 2000
    p = np.full(num, 1.0 / num)
    for found in range(0, 200, 7):
        counts = np.full(num, (count - found) // (num - 1))
        counts[0] = found
        statistic = draw_tests(Law(p, np.zeros(num)), np.repeat(np.arange(num), counts))["token"]
        tail = (
            scipy.stats.binom.cdf(found, counts.sum(), p[0])
            if found < count / num
            else (scipy.stats.binom.sf(found - 1, counts.sum(), p[0]))
        )
        if statistic > 1.0:
            assert tail <= ALPHA / (3.0 * 2.0 * num) * 1.01


@pytest.mark.clause("PA-SAMPLE-2")
def test_what_is_no_index_is_rejected() -> None:
    law = two_levels()
    assert worst(law, np.array([0, VOCABULARY])) == math.inf
    assert worst(law, np.array([-1])) == math.inf
