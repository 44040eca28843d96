"""Memory-mapped files: giving pages back.   Clause: MD-PACK-5 (specs/model_files.md)."""

from __future__ import annotations

import mmap


def release_pages(mapped: mmap.mmap | bytes, start_bytes: int, num_bytes: int) -> None:
    """Tell the system that these bytes of a mapped file are not needed for now: their pages leave resident memory.

    They come back, unchanged, when they are read again. Whole pages inside the range only; nothing happens where the
    system has no such call, or for bytes that are not mapped.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if isinstance(mapped, bytes) or advice is None or mapped.closed:
        return
    page = mmap.PAGESIZE
    first, last = -(-start_bytes // page) * page, (start_bytes + num_bytes) // page * page
    if last > first:
        mapped.madvise(advice, first, last - first)
