"""Length distributions for prompts and outputs; every length is an integer >= 1.

fixed:N                        N
uniform:LOW,HIGH               every integer of LOW..HIGH equally likely
lognormal:MEDIAN,SIGMA[,MAX]   round(exp(N(ln MEDIAN, SIGMA))), at least 1, at most MAX
empirical:TRACE                drawn, with replacement, from the lengths in a trace file
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.workload.spec import parse_spec, require

FORMS = {"fixed": (1, 1), "uniform": (2, 2), "lognormal": (2, 3)}
LARGEST_LENGTH_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """A law of lengths. `numbers` are the numbers of its text form; `observed` the sample of `empirical`."""

    name: str
    numbers: tuple[float, ...] = ()
    observed: tuple[int, ...] = field(default=(), repr=False)

    @staticmethod
    def parse(text: str) -> LengthDistribution:
        """From "fixed:128", "uniform:1,1024" or "lognormal:256,0.8[,4096]". Pure.  [SI-LENGTH-1]

        Raises InvalidParameterError for unknown names and lengths below 1 or above 2^31.
        """
        operation = "length distribution"
        name, numbers = parse_spec(text, FORMS, operation)
        bounds = [numbers[0], *numbers[2:]] if name == "lognormal" else numbers
        in_range = all(1 <= bound <= LARGEST_LENGTH_TOKENS for bound in bounds)
        require(in_range, operation, text, f"lengths from 1 to {LARGEST_LENGTH_TOKENS} tokens")
        if name == "lognormal":
            require(numbers[1] >= 0, operation, text, "SIGMA >= 0 in lognormal:MEDIAN,SIGMA[,MAX]")
        else:
            require(all(bound == int(bound) for bound in bounds), operation, text, "whole numbers of tokens")
        if name == "uniform":
            require(numbers[0] <= numbers[1], operation, text, "LOW <= HIGH in uniform:LOW,HIGH")
        return LengthDistribution(name, tuple(numbers))

    @staticmethod
    def empirical(observed: tuple[int, ...]) -> LengthDistribution:
        """Drawn with replacement from `observed`. Raises InvalidParameterError when that is empty.  [SI-LENGTH-2]"""
        if not observed:
            raise InvalidParameterError("empirical lengths: got no observation; expected at least one length")
        return LengthDistribution("empirical", observed=observed)

    def draw(self, num_requests: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """(num_requests,) int64 lengths, each >= 1. Draws from `rng`.  [SI-LENGTH-1, SI-LENGTH-2]"""
        if self.name == "fixed":
            return np.full(num_requests, int(self.numbers[0]), dtype=np.int64)
        if self.name == "uniform":
            return rng.integers(int(self.numbers[0]), int(self.numbers[1]), num_requests, endpoint=True)
        if self.name == "empirical":
            return rng.choice(np.asarray(self.observed, dtype=np.int64), num_requests)
        ceiling = self.numbers[2] if len(self.numbers) == 3 else LARGEST_LENGTH_TOKENS
        drawn = rng.lognormal(math.log(self.numbers[0]), self.numbers[1], num_requests)
        return np.clip(np.rint(drawn), 1, ceiling).astype(np.int64)
