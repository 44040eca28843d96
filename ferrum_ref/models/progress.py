"""What a download tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class PullProgress(Protocol):
    """Receives a download's steps; called from the pulling thread only."""

    def note(self, text: str) -> None:
        """One line for a person: a source that was skipped and why, a wait."""

    def start(self, task: str, total_bytes: int | None) -> None:
        """A step begins; None when its length is unknown."""

    def advance(self, num_bytes: int) -> None:
        """That many bytes more of the current step are done."""

    def finish(self) -> None:
        """The current step is over, well or not."""


class Silent:
    """A PullProgress that ignores everything."""

    def note(self, text: str) -> None:
        return None

    def start(self, task: str, total_bytes: int | None) -> None:
        return None

    def advance(self, num_bytes: int) -> None:
        return None

    def finish(self) -> None:
        return None
