"""What a cost model is told about a step, and what it must answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's work: sequence b computes `new_tokens[b]` tokens on top of `cached_tokens[b]` cached ones.

    The sums are what most cost models need; they are exact integers.  [SI-COST-1]
    num_sampled: sequences that get a token out of the step (rows of logits).
    num_decode_*: sequences with one new token; num_prefill_*: with more. `attended` counts (query, key) pairs,
    T*S + T(T+1)/2 a sequence; `kv_tokens` the positions whose keys and values are read, S + T a sequence.
    """

    new_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    num_sampled: int
    num_new_tokens: int
    num_decode_sequences: int
    num_decode_kv_tokens: int
    num_prefill_kv_tokens: int
    num_prefill_attended: int

    @property
    def num_sequences(self) -> int:
        return len(self.new_tokens)

    @staticmethod
    def of(new_tokens: tuple[int, ...], cached_tokens: tuple[int, ...], num_sampled: int) -> StepBatch:
        """The batch with its sums. Pure.  [SI-COST-1]"""
        total = num_decode = decode_kv = prefill_kv = attended = 0
        for new, cached in zip(new_tokens, cached_tokens, strict=True):
            total += new
            if new == 1:
                num_decode += 1
                decode_kv += cached + 1
            else:
                prefill_kv += cached + new
                attended += new * cached + new * (new + 1) // 2
        return StepBatch(new_tokens, cached_tokens, num_sampled, total, num_decode, decode_kv, prefill_kv, attended)

    def after(self, num_steps: int) -> StepBatch:
        """The batch `num_steps` decode steps on: every context longer by that much. Pure.  [SI-COST-2]

        Meant for batches in which every sequence decodes (one new token each).
        """
        cached = tuple(length + num_steps for length in self.cached_tokens)
        return StepBatch.of(self.new_tokens, cached, self.num_sampled)


class CostModel(Protocol):
    """Says how long steps take.  [SI-COST-2]

    `stretch_times_s(batch, n)[j]` equals `step_time_s(batch.after(j))` to the last bit for j < n: a simulation that
    takes decode steps in one stretch must give what single steps give.
    """

    def step_time_s(self, batch: StepBatch) -> float:
        """Seconds from the start of the step to its end, finite and >= 0. Pure."""
        ...

    def stretch_times_s(self, batch: StepBatch, num_steps: int) -> NDArray[np.float64]:
        """(num_steps,) float64: the times of `num_steps` decode steps that begin with `batch`. Pure."""
        ...
