"""Where in an arena a block goes: best, first, worst or next fit.

Clauses: ME-PLACE-1..4 (specs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.numpy_backend.memory.free_list import FreeList

PlacementName = Literal["best_fit", "first_fit", "worst_fit", "next_fit"]


class Placement(Protocol):
    """Chooses the offset of a new block."""

    def choose(self, free: FreeList, num_bytes: int, alignment: int) -> int | None:
        """An aligned offset with `num_bytes` free from there on, or None."""


def align_up(offset: int, alignment: int) -> int:
    """The lowest multiple of `alignment` (a power of two) not below `offset`. Pure."""
    return (offset + alignment - 1) & -alignment


def first_fitting(runs: Iterable[tuple[int, int]], num_bytes: int, alignment: int) -> int | None:
    """The lowest aligned offset inside the first run that holds the block, or None. Pure."""
    for start, end in runs:
        offset = align_up(start, alignment)
        if offset + num_bytes <= end:
            return offset
    return None


class BestFit:
    """The smallest run that holds the block, the lowest on a tie.  [ME-PLACE-1]"""

    def choose(self, free: FreeList, num_bytes: int, alignment: int) -> int | None:
        return first_fitting(free.by_size(num_bytes), num_bytes, alignment)


class FirstFit:
    """The lowest run that holds the block.  [ME-PLACE-2]"""

    def choose(self, free: FreeList, num_bytes: int, alignment: int) -> int | None:
        return first_fitting(free.by_address(), num_bytes, alignment)


class WorstFit:
    """The largest run that holds the block, the lowest on a tie.  [ME-PLACE-3]"""

    def choose(self, free: FreeList, num_bytes: int, alignment: int) -> int | None:
        largest_first = sorted(free.by_size(num_bytes), key=lambda run: (run[0] - run[1], run[0]))
        return first_fitting(largest_first, num_bytes, alignment)


class NextFit:
    """The first run from the end of the last block on, then from the bottom; remembers that end.  [ME-PLACE-4]"""

    def __init__(self) -> None:
        self._cursor = 0

    def choose(self, free: FreeList, num_bytes: int, alignment: int) -> int | None:
        offset = first_fitting(free.by_address(self._cursor), num_bytes, alignment)
        if offset is None:
            offset = first_fitting(free.by_address(), num_bytes, alignment)
        if offset is not None:
            self._cursor = offset + num_bytes
        return offset


def make_placement(name: PlacementName) -> Placement:
    """A fresh policy of that name.  Raises InvalidParameterError for an unknown one."""
    makers: dict[str, type[Placement]] = {
        "best_fit": BestFit,
        "first_fit": FirstFit,
        "worst_fit": WorstFit,
        "next_fit": NextFit,
    }
    if name not in makers:
        raise InvalidParameterError(f"memory placement: got {name!r}; expected one of {', '.join(makers)}")
    return makers[name]()
