"""How far a fetch has come.  Clause: WL-PROGRESS-1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """`source` as it may be shown; bytes that have arrived, and how many there are, None when nobody says."""

    source: str
    num_bytes: int
    total_bytes: int | None


ProgressCallback = Callable[[LoadProgress], None]
"""Called from worker threads, once per chunk; `num_bytes` falls only when a download must start over."""


def silent(progress: LoadProgress) -> None:
    """The callback that does nothing."""
