"""The text of one answer as it grows token by token.  Clauses: EN-TEXT-1..3 (specs/engine.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ferrum_ref.engine.stop import StopMatcher
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer


class AnswerText:
    """Tokens in, certain text out: whole characters only, and nothing of a stop string.  [EN-TEXT-1..3; D-23, D-68]"""

    __slots__ = ("_matcher", "_pieces", "_state", "_tokenizer")

    def __init__(self, tokenizer: IncrementalTokenizer[Any], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._state = tokenizer.create_state()
        self._matcher = StopMatcher(stops)
        self._pieces: list[str] = []

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched

    def feed(self, token: int) -> str:
        """The text that has become certain with this token, possibly none.  Mutates."""
        return self._keep(self._matcher.feed(self._tokenizer.decode_incremental_with_state(self._state, token)))

    def finish(self) -> str:
        """The rest, once no token follows: characters still incomplete and heads of stop strings.  Mutates."""
        certain = self._matcher.feed(self._tokenizer.flush(self._state))
        return self._keep(certain + self._matcher.flush())

    def text(self) -> str:
        """All text that was certain so far."""
        return "".join(self._pieces)

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
