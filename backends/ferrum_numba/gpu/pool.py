"""Device memory kept for reuse.  Clause: BK-NCUDA-40 (specs/backend_numba_cuda.md).

Asking the driver for memory costs as much as a small kernel, and giving it back waits for the whole device. All work of
a backend is queued on one stream, so a block that was freed while a kernel still reads it may be lent at once: whatever
writes to it next comes later on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

LEAST_BYTES: Final = 512
STEPS_PER_OCTAVE: Final = 8


class BlockPool:
    """Blocks by size; `allocate(num_bytes)` asks the device for one, and raises `exhausted` when there is none."""

    def __init__(self, allocate: Callable[[int], Any], exhausted: type[Exception]) -> None:
        self._allocate, self._exhausted = allocate, exhausted
        self._free: dict[int, list[Any]] = {}

    def take(self, num_bytes: int) -> tuple[Any, Callable[[], None]]:
        """(a block of at least so many bytes, what gives it back: to be called once, from any thread).

        Raises `exhausted` where a second try, without the blocks kept here, fails too.
        """
        size = rounded_size(num_bytes)
        kept = self._free.setdefault(size, [])
        try:
            block = kept.pop()
        except IndexError:
            block = self._fresh(size)
        return block, partial(kept.append, block)

    def kept_bytes(self) -> int:
        """Bytes of all blocks that wait for reuse. Pure."""
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def clear(self) -> None:
        """Give what is not lent back to the device."""
        for blocks in self._free.values():
            blocks.clear()  # the same lists: what is lent comes back to them

    def _fresh(self, size: int) -> Any:
        if not self.kept_bytes():
            return self._allocate(size)
        try:
            return self._allocate(size)
        except self._exhausted:
            self.clear()
            return self._allocate(size)


def rounded_size(num_bytes: int) -> int:
    """The size of block that serves `num_bytes`: at most an eighth more, so that few sizes occur. Pure."""
    step = max(LEAST_BYTES, (1 << max(0, num_bytes - 1).bit_length()) // (2 * STEPS_PER_OCTAVE))
    return max(LEAST_BYTES, -(-num_bytes // step) * step)
