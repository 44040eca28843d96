"""The bytes behind a pool: one reserved buffer whose pages cost nothing until they are touched.

The start of the buffer lies on a 2 MiB boundary, so an offset and the address at it share every alignment up to there.
Clauses: ME-ALLOC-2, ME-ALLOC-5, ME-DEBUG-1 (specs/memory.md).
"""

from __future__ import annotations

import mmap
import sys

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ResourceExhaustedError

MAX_ALIGNMENT_BYTES = 2 << 20
POISON = 0xDD

Bytes = NDArray[np.uint8]


class Arena:
    """`limit_bytes` of memory; `touched_bytes` is the end of what was ever lent, and all above it is zero."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.touched_bytes = 0
        self._region, self._first_byte, self._bytes = _reserve(limit_bytes)

    def view(self, start: int, end: int) -> Bytes:
        """The bytes [start, end) themselves, not a copy."""
        return self._bytes[start:end]

    def lend(self, start: int, end: int, *, poison: bool) -> None:
        """Zero [start, end) for a new owner; `poison` marks the bytes skipped below it."""
        if poison and start > self.touched_bytes:
            self._bytes[self.touched_bytes : start] = POISON
        self._bytes[start : min(end, self.touched_bytes)] = 0
        self.touched_bytes = max(self.touched_bytes, end)

    def poison(self, start: int, end: int) -> None:
        """Mark bytes that nobody may write to."""
        self._bytes[start:end] = POISON

    def is_poisoned(self, start: int, end: int) -> bool:
        """All of [start, end) that was ever lent still carries the mark."""
        return bool((self._bytes[start : min(end, self.touched_bytes)] == POISON).all())

    def move(self, start: int, target: int, num_bytes: int) -> None:
        """memmove inside the arena."""
        self._bytes[target : target + num_bytes] = self._bytes[start : start + num_bytes]

    def discard(self, start: int) -> None:
        """Give everything from `start` back to the operating system; it is zero afterwards."""
        end = self.touched_bytes
        if start >= end:
            return
        offset = self._first_byte
        first = -(-(offset + start) // mmap.PAGESIZE) * mmap.PAGESIZE - offset
        if self._region is not None and first < end:
            self._bytes[start:first] = 0
            self._region.madvise(mmap.MADV_DONTNEED, offset + first, end - first)
        else:
            self._bytes[start:end] = 0
        self.touched_bytes = start


def _reserve(num_bytes: int) -> tuple[mmap.mmap | None, int, Bytes]:
    """A region, where in it an aligned window of `num_bytes` starts, and the window.  Raises ResourceExhaustedError."""
    reserved = num_bytes + MAX_ALIGNMENT_BYTES
    region: mmap.mmap | None = None
    try:
        if sys.platform == "linux":  # private pages, so that MADV_DONTNEED really gives them back as zeros
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            region = mmap.mmap(-1, reserved, flags=flags)
            whole = np.frombuffer(region, np.uint8)
        else:
            whole = np.zeros(reserved, np.uint8)
    except (OSError, OverflowError, ValueError, MemoryError) as error:
        raise ResourceExhaustedError(
            f"memory arena: cannot reserve {num_bytes} bytes ({error}); lower the capacity or the pool's max_size"
        ) from None
    start = -whole.ctypes.data % MAX_ALIGNMENT_BYTES
    return region, start, whole[start : start + num_bytes]
