"""Arrival processes: independent gaps with a stated law. Nothing is clipped, so the rate is the rate asked for.

constant:RATE        gap = 1/RATE
poisson:RATE         gap ~ Exponential, mean 1/RATE
gamma:RATE,CV        gap ~ Gamma, mean 1/RATE, coefficient of variation CV (CV > 1: bursts; CV = 1: Poisson)
weibull:RATE,SHAPE   gap ~ Weibull, mean 1/RATE, shape SHAPE (SHAPE < 1: bursts; SHAPE = 1: Poisson)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferrum_sim.workload.spec import parse_spec, require

FORMS = {"constant": (1, 1), "poisson": (1, 1), "gamma": (2, 2), "weibull": (2, 2)}


@dataclass(frozen=True, slots=True)
class ArrivalProcess:
    """A renewal process: `rate_per_s` arrivals a second, `shape` the second parameter of gamma and weibull."""

    name: str
    rate_per_s: float
    shape: float = 1.0

    @staticmethod
    def parse(text: str) -> ArrivalProcess:
        """From "poisson:4", "constant:4", "gamma:4,2" or "weibull:4,0.7". Pure.  [SI-ARRIVAL-1]

        Raises InvalidParameterError for unknown names, rates <= 0 and second numbers outside 0.01..100.
        """
        operation = "arrival process"
        name, numbers = parse_spec(text, FORMS, operation)
        require(numbers[0] > 0, operation, text, "a rate > 0 requests per second")
        require(len(numbers) < 2 or 0.01 <= numbers[1] <= 100, operation, text, "a second number from 0.01 to 100")
        return ArrivalProcess(name, *numbers)

    def gaps_s(self, num_requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """(num_requests,) float64 gaps in seconds; the first is the wait before request 0. Draws from `rng`.

        gamma: shape k = 1/CV^2, scale CV^2/RATE.  weibull: scale 1/(RATE * Gamma(1 + 1/SHAPE)).  [SI-ARRIVAL-1..3]
        Source: Johnson, Kotz, Balakrishnan, Continuous Univariate Distributions 1 (1994), ch. 17 and 21.
        """
        mean_s = 1.0 / self.rate_per_s
        if self.name == "constant":
            return np.full(num_requests, mean_s)
        if self.name == "poisson":
            return rng.exponential(mean_s, num_requests)
        if self.name == "gamma":
            variance = self.shape**2
            return rng.gamma(1.0 / variance, mean_s * variance, num_requests)
        return rng.weibull(self.shape, num_requests) * (mean_s / math.gamma(1.0 + 1.0 / self.shape))

    def arrivals_s(self, num_requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """(num_requests,) arrival times: the running sum of the gaps. Draws from `rng`.  [SI-ARRIVAL-2]"""
        return np.cumsum(self.gaps_s(num_requests, rng))
