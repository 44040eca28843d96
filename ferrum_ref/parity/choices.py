"""Which indices a sampler may draw, and whether many draws follow their distribution.

Every test is a concentration inequality that holds for any number of draws, so an honest sampler is rejected with
probability at most ALPHA; no table of quantiles is needed.

    each token   n KL(count / n || p) > ln(2 V / a)                        (Chernoff)
    temperature  t^2 / (2 (n var + M t / 3)) > ln(2 / a), t = |sum x - n mean|   (Bernstein), x the scaled logits
    chi-square   X^2 > k + 2 sqrt(k L) + 2 L, L = ln(1 / a)                (Laurent and Massart 2000, lemma 1)

with a = ALPHA / 3. The scaled logits are the sufficient statistic of the temperature, hence the sharpest test for it.
Clauses: PA-SAMPLE-1..4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ALPHA = 1e-9
TESTS = ("token", "temperature", "chi-square")
MIN_EXPECTED = 10.0  # a cell of the chi-square test expects at least that many draws


@dataclass(frozen=True, slots=True)
class Choice:
    """The admissible indices of n draws: first <= index <= last, and `possible[index]`."""

    first: Array
    last: Array
    possible: Array

    def admits(self, drawn: Array) -> Array:
        """(n,) bool. Pure."""
        inside = (drawn >= 0) & (drawn < self.possible.size)
        index = np.where(inside, drawn, 0)
        admitted: Array = inside & (drawn >= self.first) & (drawn <= self.last) & self.possible[index]
        return admitted


@dataclass(frozen=True, slots=True)
class Law:
    """The distribution of one draw: probabilities (V,), and the scaled logits of the kept indices."""

    probabilities: Array
    scores: Array


def draw_tests(law: Law, drawn: Array) -> Mapping[str, float]:
    """Each test's statistic over its critical value: above 1 rejects at ALPHA. Pure.  [PA-SAMPLE-2..4]"""
    if not np.all((drawn >= 0) & (drawn < law.probabilities.size)):
        return dict.fromkeys(TESTS, math.inf)
    counts = np.bincount(drawn.astype(np.int64), minlength=law.probabilities.size)
    return {
        "token": _token_ratio(law.probabilities, counts),
        "temperature": _temperature_ratio(law, counts),
        "chi-square": _chi_square_ratio(law.probabilities, counts),
    }


def _level() -> float:
    return math.log(len(TESTS) / ALPHA)


def _token_ratio(p: Array, counts: Array) -> float:
    """The rarest count of any index, in n KL(count / n || p) over its critical value."""
    num_draws = counts.sum()
    share = counts / max(num_draws, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        hit = np.where(share > 0.0, share * (np.log(share) - np.log(p)), 0.0)
        missed = np.where(share < 1.0, (1.0 - share) * (np.log1p(-share) - np.log1p(-p)), 0.0)
    statistic = float(num_draws * np.max(hit + missed, initial=0.0))
    return statistic / (_level() + math.log(2.0 * p.size))


def _temperature_ratio(law: Law, counts: Array) -> float:
    kept = law.probabilities > 0.0
    p, scores = law.probabilities[kept], law.scores[kept]
    num_draws = counts.sum()
    mean = float(p @ scores)
    variance, largest = float(p @ np.square(scores - mean)), float(np.max(np.abs(scores - mean)))
    shift = abs(float(counts[kept] @ scores) - num_draws * mean)
    spread = 2.0 * (num_draws * variance + largest * shift / 3.0)
    if spread <= 0.0:
        return 0.0
    return float(shift**2 / spread / (_level() + math.log(2.0)))


def _chi_square_ratio(p: Array, counts: Array) -> float:
    """Pearson's statistic; indices that expect fewer than MIN_EXPECTED draws share one cell."""
    num_draws = counts.sum()
    expected = num_draws * p
    common = expected >= MIN_EXPECTED
    cells = np.append(expected[common], expected[~common].sum())
    found = np.append(counts[common], counts[~common].sum())
    if cells[-1] < MIN_EXPECTED:  # too few for a cell of its own
        cells, found = cells[:-1], found[:-1]
    freedom = cells.size - 1
    if freedom < 1:
        return 0.0
    statistic = float(np.sum(np.square(found - cells) / cells))
    level = _level()
    return statistic / (freedom + 2.0 * math.sqrt(freedom * level) + 2.0 * level)
