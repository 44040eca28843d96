"""What a run leaves behind: one record a request, one row a step. Exact values, nothing sampled.  [SI-METRIC-1]"""

from __future__ import annotations

import math
from array import array
from dataclasses import astuple, dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ferrum_sim.workload.request import SimRequest

Column = NDArray[np.float64] | NDArray[np.int64]
_NONE = array("q", (0,))
FINISHED, REJECTED, UNFINISHED = "finished", "rejected", "unfinished"


@dataclass(slots=True)
class RequestRecord:
    """One request's life; times are seconds of virtual time, NaN where the event never came.

    noticed_s: the end of the step (or the idle moment) in which the engine took the request in.
    first_scheduled_s: start of the first step that computes any of its tokens.
    """

    request: SimRequest
    status: str = UNFINISHED
    noticed_s: float = math.nan
    first_scheduled_s: float = math.nan
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    finish_s: float = math.nan
    num_generated_tokens: int = 0
    max_itl_s: float = math.nan
    num_preemptions: int = 0
    num_cached_prompt_tokens: int = 0
    finish_reason: str = ""


STEP_FLOATS = ("start_s", "end_s")
STEP_COUNTS = (
    "num_sequences",
    "num_new_tokens",
    "num_sampled",
    "num_preempted",
    "used_blocks",
    "num_running",
    "num_waiting",
)


@dataclass(slots=True)
class StepLog:
    """Columns of the steps, in order; a stretch of k steps adds k rows, just as k single steps do."""

    times: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in STEP_FLOATS})
    counts: dict[str, array[int]] = field(default_factory=lambda: {name: array("q") for name in STEP_COUNTS})
    itl_s: array[float] = field(default_factory=lambda: array("d"))
    itl_ends_s: array[float] = field(default_factory=lambda: array("d"))
    itl_counts: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.times["end_s"])

    def add_steps(self, times_s: list[float], used_blocks: list[int], num_preempted: int, **same: int) -> None:
        """Add the steps between the instants `times_s`; `same` are the columns with one value in all of them.

        `num_preempted` counts for the first step: a stretch that preempts does so before it begins. Mutates self.
        """
        num_steps = len(times_s) - 1
        self.times["start_s"].fromlist(times_s[:-1])
        self.times["end_s"].fromlist(times_s[1:])
        self.counts["used_blocks"].fromlist(used_blocks)
        self.counts["num_preempted"].append(num_preempted)
        self.counts["num_preempted"].extend(_NONE * (num_steps - 1))
        for name, value in same.items():
            self.counts[name].extend(array("q", (value,)) * num_steps)

    def add_gap(self, gap_s: float, end_s: float, count: int) -> None:
        """A gap before the tokens that `count` requests got at `end_s`. Mutates self."""
        self.itl_s.append(gap_s)
        self.itl_ends_s.append(end_s)
        self.itl_counts.append(count)

    def add_gaps(self, gaps_s: list[float], ends_s: list[float], count: int) -> None:
        """Gaps before the tokens that the same `count` requests got at each of `ends_s`. Mutates self."""
        self.itl_s.fromlist(gaps_s)
        self.itl_ends_s.fromlist(ends_s)
        self.itl_counts.extend(array("q", (count,)) * len(gaps_s))

    def arrays(self) -> dict[str, Column]:
        """The columns as float64 (times) and int64 (counts) arrays. Pure."""
        times: dict[str, Column] = {name: np.array(values, dtype=np.float64) for name, values in self.times.items()}
        return times | {name: np.array(values, dtype=np.int64) for name, values in self.counts.items()}

    def itl_distribution(self, from_s: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distinct gaps that end at `from_s` or later, ascending, and how often each occurred. Pure.

        The multiset is the same however the gaps were added.
        """
        kept = np.array(self.itl_ends_s, dtype=np.float64) >= from_s
        gaps_s = np.array(self.itl_s, dtype=np.float64)[kept]
        weights = np.array(self.itl_counts, dtype=np.float64)[kept]
        values, places = np.unique(gaps_s, return_inverse=True)
        counts = np.bincount(places, weights=weights, minlength=len(values))
        return values, counts.astype(np.int64)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything a simulation produced. `records[i]` belongs to request i of the workload."""

    records: tuple[RequestRecord, ...]
    steps: StepLog
    num_blocks: int
    block_size: int

    def digest(self) -> str:
        """blake2b-128 of every record, step and gap: equal exactly when two runs are equal to the last bit. Pure."""
        hasher = blake2b(digest_size=16)
        for record in self.records:
            hasher.update(repr(astuple(record)).encode())
        arrays = [*self.steps.arrays().values(), *self.steps.itl_distribution()]
        for values in arrays:
            hasher.update(values.tobytes())
        return hasher.hexdigest()
