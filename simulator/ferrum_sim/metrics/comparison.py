"""Paired comparison of two runs of one workload: is the difference real?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.metrics.intervals import CONFIDENCE, Interval, batch_means
from ferrum_sim.metrics.records import FINISHED

PAIRED = ("ttft_s", "tpot_s", "e2e_s", "queue_time_s")
LOWER, HIGHER, UNCLEAR = "really lower", "really higher", "not distinguishable"
PROBABLY_LOWER, PROBABLY_HIGHER = "probably lower", "probably higher"


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """`difference` = other - baseline, request by request, over the requests that finished in both runs."""

    metric: str
    baseline_mean: float
    other_mean: float
    difference: Interval
    num_pairs: int

    @property
    def verdict(self) -> str:
        """What the interval says of 0; only "probably" where dependent batches make it too narrow. Pure."""
        if not self.difference.excludes_zero():
            return UNCLEAR
        if self.difference.is_dependent:
            return PROBABLY_LOWER if self.difference.mean < 0 else PROBABLY_HIGHER
        return LOWER if self.difference.mean < 0 else HIGHER


def compare_runs(
    baseline: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]], num_comparisons: int = 1
) -> list[PairedDifference]:
    """Paired differences of the main figures, with intervals that hold jointly at 95 %.  [SI-STAT-2]

    Both are `request_columns` of runs of one workload: equal seeds give equal requests, so what the workload varies
    cancels in the difference. Bonferroni: each interval has level 1 - 0.05/(num_comparisons * number of figures). Pure.
    Raises InvalidParameterError when the runs have different requests.
    """
    same = len(baseline["index"]) == len(other["index"]) and all(
        np.array_equal(baseline[name], other[name]) for name in ("num_prompt_tokens", "num_output_tokens")
    )
    if not same:
        raise InvalidParameterError(
            "compare_runs: the two runs have different requests; expected one workload (same trace, seed and limit)"
        )
    level = 1.0 - (1.0 - CONFIDENCE) / (num_comparisons * len(PAIRED))
    both = (baseline["status"] == FINISHED) & (other["status"] == FINISHED)
    differences = []
    for metric in PAIRED:
        kept = both & ~np.isnan(baseline[metric]) & ~np.isnan(other[metric])
        left, right = baseline[metric][kept], other[metric][kept]
        interval = batch_means(right - left, level)
        differences.append(PairedDifference(metric, _mean(left), _mean(right), interval, len(left)))
    return differences


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
