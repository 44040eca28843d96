"""The free runs of an arena: sorted by address for joining neighbours, by size for the best fit.

Clauses: ME-POOL-1..2 (specs/memory.md).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

from ferrum_ref.errors import InternalError


class FreeList:
    """Disjoint runs [start, end) that never touch: neighbours are joined at once."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self.total_bytes = 0

    def add(self, start: int, end: int) -> None:
        """Make [start, end) free.  Raises InternalError if any of it is free already."""
        if start == end:
            return
        index = bisect_left(self._starts, start)
        before = self._starts[index - 1] if index else None
        after = self._starts[index] if index < len(self._starts) else None
        if (before is not None and self._ends[before] > start) or (after is not None and after < end):
            raise InternalError(f"memory free list: [{start}, {end}) is already free")
        if after is not None and after == end:
            end = self._remove(after)
        if before is not None and self._ends[before] == start:
            self._remove(before)
            start = before
        self._insert(start, end)

    def take(self, start: int, end: int) -> None:
        """Take [start, end) out of the one run that holds it.  Raises InternalError if none does."""
        run = self.run_at(start)
        if run is None or run[1] < end:
            raise InternalError(f"memory free list: [{start}, {end}) is not free")
        self._remove(run[0])
        if run[0] < start:
            self._insert(run[0], start)
        if end < run[1]:
            self._insert(end, run[1])

    def run_at(self, offset: int) -> tuple[int, int] | None:
        """The run that holds the byte at `offset`. Pure."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or self._ends[self._starts[index]] <= offset:
            return None
        return self._starts[index], self._ends[self._starts[index]]

    def by_address(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Runs that start at `first` or later, in order of address. Pure."""
        for start in self._starts[bisect_left(self._starts, first) :]:
            yield start, self._ends[start]

    def by_size(self, at_least: int) -> Iterator[tuple[int, int]]:
        """Runs of at least that many bytes, smallest first, then lowest address. Pure."""
        for size, start in self._by_size[bisect_left(self._by_size, (at_least, -1)) :]:
            yield start, start + size

    def tail_start(self, end: int) -> int:
        """Start of the run that reaches `end`; `end` itself when none does. Pure."""
        return self._starts[-1] if self._starts and self._ends[self._starts[-1]] == end else end

    def _insert(self, start: int, end: int) -> None:
        insort(self._starts, start)
        self._ends[start] = end
        insort(self._by_size, (end - start, start))
        self.total_bytes += end - start

    def _remove(self, start: int) -> int:
        end = self._ends.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_size[bisect_left(self._by_size, (end - start, start))]
        self.total_bytes -= end - start
        return end
