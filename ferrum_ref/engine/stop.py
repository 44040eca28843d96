"""Stop strings in text that arrives in pieces.  Clauses: EN-STOP-1..3 (specs/engine.md)."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through up to the first stop string, and holds back what may yet become one.  [EN-STOP-1..3; D-68]

    The first stop string is the one that ends first, and of those that end together the longest: what a reader sees who
    gets the text character by character. So the result does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_held", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(s) for s in self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is certain now: neither part of a stop string nor possibly the head of one.

        Nothing after a match. Mutates the matcher.
        """
        if self.matched is not None or not piece:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, once it is certain that nothing follows.  Mutates the matcher."""
        rest, self._held = self._held, ""
        return rest

    def _first_possible_start(self, text: str) -> int:
        """Start of the longest suffix that is a proper prefix of a stop string; len(text) if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            suffix = text[start:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return start
        return len(text)
