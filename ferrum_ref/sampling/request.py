"""Choosing the tokens of one request: its pipeline, its random source and what it has seen so far.

Clauses: SA-REQUEST-1..3 (specs/sampler.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.interfaces.sampler import Logits, Order, SamplingConfig, SamplingContext
from ferrum_ref.sampling.rng import RequestRandom
from ferrum_ref.types.sampling import SamplingParams


class RequestSampler:
    """Draws a request's tokens; all state is here, so preemption replays nothing.  [SA-REQUEST-1..3; D-69]

    The repetition penalty sees prompt and generated ids (D-02), presence and frequency penalties generated ids (D-20).
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], *, order: Order = "temperature_last"
    ) -> None:
        self.config = SamplingConfig.from_params(params, order=order)
        self.random = RequestRandom(params.seed)
        self._params = params
        self._counts: dict[int, int] = {}
        self._seen = dict.fromkeys(prompt_token_ids) if params.repetition_penalty != 1.0 else None
        self._num_generated = 0

    def next_token(self, logits: Logits) -> int:
        """The next token of the request.  `logits` (V,) are left as they are; a failed choice changes nothing.

        Raises BackendError when the logits hold NaN or leave no candidate.
        """
        if len(self.config.processor_chain):
            logits = logits.copy()
        seen = np.fromiter(self._seen, np.int64, len(self._seen)) if self._seen is not None else ()
        context = SamplingContext(self._num_generated, self._params, logits, seen, self._counts, len(logits))
        token = int(self.config.sample(context, self.random))
        self._num_generated += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._seen is not None:
            self._seen[token] = None
        return token
