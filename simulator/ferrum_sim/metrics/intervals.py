"""Confidence intervals for means of dependent observations: non-overlapping batch means.

Source: Law, Simulation Modeling and Analysis, 5th ed., section 9.5.3; Student's t through the incomplete beta function,
Press et al., Numerical Recipes, 3rd ed., section 6.4 (Lentz's continued fraction).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError

NUM_BATCHES = 20
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and what is known of it. `half_width` is None where there are too few observations.

    `lag_one` is the correlation of neighbouring batch means: where it is far above 0 (> 2/sqrt(batches)) the batches
    are too short for their means to be independent, and the interval is narrower than it should be (`is_dependent`).
    """

    mean: float
    half_width: float | None
    lag_one: float | None = None
    num_batches: int = NUM_BATCHES

    @property
    def is_dependent(self) -> bool:
        return self.lag_one is not None and self.lag_one > 2.0 / math.sqrt(self.num_batches)

    def excludes_zero(self) -> bool:
        """True when 0 lies outside mean +- half_width. Pure."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def batch_means(
    values: NDArray[np.float64], confidence: float = CONFIDENCE, num_batches: int = NUM_BATCHES
) -> Interval:
    """mean +- t(1 - (1 - confidence)/2, b - 1) * s / sqrt(b), s the deviation of b batch means.  [SI-STAT-1]

    values (n,) in arrival order, free of NaN. Batches are contiguous and of equal size; the first n mod b values belong
    to none. Fewer than 2 b values: no half width. No values: mean NaN. Pure.
    """
    if num_batches < 2 or not 0.0 < confidence < 1.0:
        raise InvalidParameterError(
            f"batch_means: num_batches is {num_batches} and confidence {confidence}; expected >= 2 and in (0, 1)"
        )
    if len(values) == 0:
        return Interval(math.nan, None, None, num_batches)
    mean = float(np.mean(values))
    size = len(values) // num_batches
    if size < 2:
        return Interval(mean, None, None, num_batches)
    means = values[len(values) - size * num_batches :].reshape(num_batches, size).mean(axis=1)
    deviation = float(np.std(means, ddof=1))
    quantile = student_t_quantile(0.5 + confidence / 2.0, num_batches - 1)
    centred = means - means.mean()
    variance = float(np.sum(centred * centred))
    lag_one = float(np.sum(centred[1:] * centred[:-1])) / variance if variance > 0.0 else 0.0
    return Interval(mean, quantile * deviation / math.sqrt(num_batches), lag_one, num_batches)


def student_t_quantile(probability: float, degrees: int) -> float:
    """x with P(T <= x) = probability for Student's t with `degrees` degrees of freedom; 0.5 < probability < 1. Pure."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2.0
    while True:
        middle = (low + high) / 2.0
        if middle in (low, high):
            return middle
        if student_t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle


def student_t_cdf(x: float, degrees: int) -> float:
    """P(T <= x) = 1 - I_z(v/2, 1/2)/2 for x >= 0, z = v/(v + x^2). Pure."""
    return 1.0 - _incomplete_beta(degrees / (degrees + x * x), degrees / 2.0, 0.5) / 2.0


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    numerator, denominator = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    fraction = denominator
    for m in range(1, 400):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        for coefficient in (even, odd):
            denominator = 1.0 / (1.0 + coefficient * denominator)
            numerator = 1.0 + coefficient / numerator
            fraction *= numerator * denominator
        if abs(numerator * denominator - 1.0) < 1e-16:
            break
    return math.exp(log_front) * fraction / a
