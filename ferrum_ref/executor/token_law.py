"""The distribution a request's next token is drawn from: its logits after penalties, top-k, top-p, min-p, temperature.

Clauses: MX-SPEC-8 (specs/model_executor.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.executor.speculation import Floats, token_distribution
from ferrum_ref.interfaces.sampler import Order, SamplingConfig, SamplingContext
from ferrum_ref.types.sampling import SamplingParams


class TokenLaw:
    """One request's pipeline as a map from logits to probabilities.  [MX-SPEC-8]"""

    def __init__(self, params: SamplingParams, order: Order = "temperature_last") -> None:
        """Raises as `SamplingConfig.from_params`."""
        self._params = params
        self._config = SamplingConfig.from_params(params, order=order)
        cold = self._config.sampler.is_deterministic()
        self._temperature = 0.0 if cold else float(params.temperature)
        alone = SamplingParams(temperature=params.temperature)
        self._processor_count = len(self._config.processor_chain)
        self.is_plain = self._processor_count == len(SamplingConfig.from_params(alone, order=order).processor_chain)

    def rows(self, logits: npt.NDArray[np.float32], prompt: Sequence[int], generated: Sequence[int]) -> Floats:
        """logits `[n, V]` after the last n-1, ..., 0 tokens of `generated` are still to come -> probabilities. Pure.

        Row i is judged with all but the last n-1-i generated tokens behind it. Raises as the processors do.
        """
        if self.is_plain:
            return token_distribution(logits, self._temperature)
        num = len(logits)
        adjusted = []
        for index, row in enumerate(logits):
            behind = generated[: len(generated) - (num - 1) + index]
            context = SamplingContext(
                len(behind), self._params, row.copy(), [*prompt, *behind], Counter(behind), len(row)
            )
            self._config.processor_chain.process(context)
            adjusted.append(context.logits)
        return token_distribution(np.stack(adjusted), 0.0 if self._config.sampler.is_deterministic() else 1.0)
