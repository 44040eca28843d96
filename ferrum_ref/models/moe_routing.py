"""Which experts a token goes to, and with what weights: decided on the host, in float64.

Clauses: LM-MOE-1..3 (specs/decoder_families.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.models.moe_config import MoeSettings

Indices = NDArray[np.int64]
_GUARD: Final = 1e-20  # keeps the sum of sigmoids, which may all underflow, above 0


@dataclass(frozen=True, slots=True)
class Routing:
    """experts `[R, k]`, ascending in each row; weights `[R, k]` float64."""

    experts: Indices
    weights: NDArray[np.float64]

    def by_expert(self) -> Iterator[tuple[int, Indices]]:
        """Each expert that is wanted, in ascending order, with its rows."""
        for expert in np.unique(self.experts):
            yield int(expert), np.nonzero((self.experts == expert).any(axis=1))[0]

    def order(self) -> Indices:
        """`[R, k]`: where the output of `(row, slot)` lies when all experts' outputs stand one below the other."""
        flat = np.argsort(self.experts, axis=None, kind="stable")
        place = np.empty(flat.size, dtype=np.int64)
        place[flat] = np.arange(flat.size)
        return place.reshape(self.experts.shape)


def route(logits: NDArray[Any], settings: MoeSettings, correction: NDArray[Any] | None = None) -> Routing:
    """The k experts of each row with the highest score plus correction; of equal ones the lowest.  [LM-MOE-1..3]

    s = softmax(logits) or sigmoid(logits); the choice looks at s + correction, among the experts of the chosen groups,
    a group's rank being the sum of its two highest. weight = s of the chosen, divided by their sum (+ 1e-20 for
    sigmoids) where normalised, times scale.  logits `[R, n]`, correction `[n]`. A row with a NaN has NaN weights. Pure.
    """
    wide = np.asarray(logits).astype(np.float64)
    scores = _scores(wide, settings.scoring)
    ranked = scores if correction is None else scores + np.asarray(correction).astype(np.float64)
    if settings.num_groups > 1:
        ranked = np.where(_in_chosen_groups(ranked, settings), ranked, -np.inf)
    experts = np.sort(_highest(ranked, settings.experts_per_token), axis=1)
    weights = np.take_along_axis(scores, experts, axis=1)
    if settings.normalised:
        guard = _GUARD if settings.scoring == "sigmoid" else 0.0
        weights = weights / (weights.sum(axis=1, keepdims=True) + guard)
    return Routing(experts, weights * settings.scale)


def _scores(logits: NDArray[np.float64], scoring: str) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        if scoring == "softmax":
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        else:
            scores = 1.0 / (1.0 + np.exp(-logits))
    scores[np.isnan(logits).any(axis=1)] = np.nan
    return np.asarray(scores)


def _in_chosen_groups(ranked: NDArray[np.float64], settings: MoeSettings) -> NDArray[np.bool_]:
    by_group = ranked.reshape(len(ranked), settings.num_groups, settings.group_size)
    ranks = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
    chosen = np.zeros(ranks.shape, dtype=np.bool_)
    np.put_along_axis(chosen, _highest(ranks, settings.num_chosen_groups), True, axis=1)
    return np.repeat(chosen, settings.group_size, axis=1)


def _highest(values: NDArray[np.float64], count: int) -> Indices:
    """Columns of the highest `count` values of each row; of equal ones the lowest column."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]
