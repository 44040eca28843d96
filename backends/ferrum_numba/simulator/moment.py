"""Who acts, and what is ordered before what.   Clause: BK-CUDASIM-6 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Dim3(NamedTuple):
    """An index or a size in three dimensions."""

    x: int
    y: int
    z: int

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class Moment(NamedTuple):
    """A thread between two of its barriers: numbers in the grid, in the block, of its warp; epochs count barriers."""

    block: int
    thread: int
    warp: int
    block_epoch: int
    warp_epoch: int
    kernel: str
    block_index: Dim3
    thread_index: Dim3

    def precedes(self, later: Moment) -> bool:
        """True if what was done now is over before `later`: same thread, or a barrier of both lies between. Pure."""
        if self.block != later.block:
            return False
        if self.thread == later.thread or self.block_epoch < later.block_epoch:
            return True
        return self.warp == later.warp and self.warp_epoch < later.warp_epoch

    @property
    def actor(self) -> str:
        return f"block {self.block_index} thread {self.thread_index}"

    @property
    def place(self) -> str:
        return f"{self.kernel}: {self.actor}"


class Clock(Protocol):
    """Tells which thread is running, and when."""

    moment: Moment
