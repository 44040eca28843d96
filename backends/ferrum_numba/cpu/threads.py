"""How work is spread over Numba's threads: as many equal runs as threads, or fewer where the work is small."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from ferrum_numba.cpu.compiled import device


@device
def num_chunks(threads, count, smallest):
    """One chunk a thread, but none, save the only one, below `smallest` items."""
    return max(1, min(threads, count // max(1, smallest)))


@device
def chunk_bounds(chunk, chunks, count):
    """First item of a chunk, and the first behind it."""
    return count * chunk // chunks, count * (chunk + 1) // chunks
