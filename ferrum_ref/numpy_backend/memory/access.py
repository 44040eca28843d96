"""How an allocation has been used: counters, and the pattern of its last accesses.

Clauses: ME-ACCESS-1..2 (specs/memory.md).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from ferrum_ref.interfaces.memory import AccessPatternType, MemoryAccessStats

WINDOW = 64

Access = tuple[int, int, float]  # offset, bytes, time in seconds


class AccessLog:
    """Counts reads and writes and remembers the last 64 accesses; mutable."""

    def __init__(self, created_s: float) -> None:
        self._num_reads = self._num_writes = 0
        self._bytes_read = self._bytes_written = 0
        self._last_s = created_s
        self._recent: deque[Access] = deque(maxlen=WINDOW)

    def read(self, offset: int, num_bytes: int, now_s: float) -> None:
        self._num_reads += 1
        self._bytes_read += num_bytes
        self._note(offset, num_bytes, now_s)

    def write(self, offset: int, num_bytes: int, now_s: float) -> None:
        self._num_writes += 1
        self._bytes_written += num_bytes
        self._note(offset, num_bytes, now_s)

    def stats(self) -> MemoryAccessStats:
        """Averages are floor(bytes / count), 0 without accesses. Pure.  [ME-ACCESS-1]"""
        return MemoryAccessStats(
            read_count=self._num_reads,
            write_count=self._num_writes,
            avg_read_size=self._bytes_read // max(1, self._num_reads),
            avg_write_size=self._bytes_written // max(1, self._num_writes),
            last_access=self._last_s,
            pattern_type=classify(list(self._recent)),
        )

    def _note(self, offset: int, num_bytes: int, now_s: float) -> None:
        self._last_s = now_s
        self._recent.append((offset, num_bytes, now_s))


def classify(accesses: Sequence[Access]) -> AccessPatternType:
    """The pattern of n accesses in order of time, by its n - 1 steps. Pure.  [ME-ACCESS-2]

    Unknown for n < 4. A step is in order when it starts where the one before ended. Sequential: at least 3/4 of the
    steps in order; else Burst: at least 3/4 of the steps take under a tenth of the mean step time; else Random: at
    most 1/4 in order; else Mixed.
    """
    if len(accesses) < 4:
        return AccessPatternType.Unknown
    num_steps = len(accesses) - 1
    num_in_order = sum(b[0] == a[0] + a[1] for a, b in itertools.pairwise(accesses))
    mean_s = (accesses[-1][2] - accesses[0][2]) / num_steps
    num_quick = sum(b[2] - a[2] < mean_s / 10 for a, b in itertools.pairwise(accesses))
    if 4 * num_in_order >= 3 * num_steps:
        return AccessPatternType.Sequential
    if 4 * num_quick >= 3 * num_steps:
        return AccessPatternType.Burst
    return AccessPatternType.Random if 4 * num_in_order <= num_steps else AccessPatternType.Mixed
