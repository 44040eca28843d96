"""Several draws from one vector of logits, without replacement.  Clauses: SA-MULTI-1..2 (specs/sampler.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.sampler import Logits, MultinomialSampler, MultiSampler, RandomSource
from ferrum_ref.types.ids import TokenId


class WithoutReplacementSampler(MultinomialSampler, MultiSampler):
    """Multinomial draws in which an id chosen once is out of the next draws.  [SA-MULTI-1..2]"""

    def sample_multiple(self, logits: Logits, num_samples: int, rng: RandomSource) -> list[TokenId]:
        """`num_samples` different ids, in order of their draw; one u32 each.  Pure in `logits`.

        Raises InvalidParameterError for fewer than one sample, BackendError when fewer candidates are left.
        """
        if num_samples < 1:
            raise InvalidParameterError(f"sample_multiple: num_samples must be >= 1, got {num_samples}")
        rest = logits.copy()
        chosen = []
        for _ in range(num_samples):
            chosen.append(self.sample(rest, rng))
            rest[chosen[-1]] = -np.inf
        return chosen

    def sample_with_probabilities(self, logits: Logits, rng: RandomSource) -> tuple[TokenId, NDArray[np.float64]]:
        """One id, and softmax(logits) in float64.  Pure in `logits`.  Raises BackendError as `sample`."""
        token = self.sample(logits, rng)
        weights = np.exp(logits.astype(np.float64) - float(logits.max()))
        return token, weights / weights.sum()

    def name(self) -> str:
        return "multinomial_without_replacement"
