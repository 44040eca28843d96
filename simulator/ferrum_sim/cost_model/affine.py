"""The simplest cost model: a constant per step, per new token and per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferrum_sim.cost_model.batch import StepBatch


@dataclass(frozen=True, slots=True)
class AffineCost:
    """time = step_s + token_s * (new tokens) + sequence_s * (sequences)          [SI-COST-3]

    With `max_num_seqs` 1 it turns the engine into a single-server queue whose service times are what the lengths say.
    """

    step_s: float = 0.0
    token_s: float = 0.0
    sequence_s: float = 0.0

    def step_time_s(self, batch: StepBatch) -> float:
        return self.step_s + self.token_s * batch.num_new_tokens + self.sequence_s * batch.num_sequences

    def stretch_times_s(self, batch: StepBatch, num_steps: int) -> NDArray[np.float64]:
        return np.full(num_steps, self.step_time_s(batch))
