"""Bugs of incremental detokenisation."""

from __future__ import annotations

from typing import Any

from ferrum_ref.parity.mutants.wrapped import Wrapped


class DecodesAlone(Wrapped):
    """Every token is decoded by itself: a character split over tokens becomes U+FFFD."""

    def decode_incremental_with_state(self, state: Any, token: int) -> str:
        self.inner.decode_incremental_with_state(state, token)
        return str(self.inner.decode([token], True))


class DropsEnd(Wrapped):
    """What is held back at the end of a stream is lost."""

    def flush(self, state: Any) -> str:
        self.inner.flush(state)
        return ""


class StripsPieces(Wrapped):
    """Spaces at the edges of a piece are lost."""

    def decode_incremental_with_state(self, state: Any, token: int) -> str:
        return str(self.inner.decode_incremental_with_state(state, token)).strip()


class HoldsBack(Wrapped):
    """Text comes out when the stream ends."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.held: dict[int, str] = {}

    def decode_incremental_with_state(self, state: Any, token: int) -> str:
        piece = str(self.inner.decode_incremental_with_state(state, token))
        self.held[id(state)] = self.held.get(id(state), "") + piece
        return ""

    def flush(self, state: Any) -> str:
        return self.held.pop(id(state), "") + str(self.inner.flush(state))

    def get_decoded_text(self, state: Any) -> str:
        return ""


class SharesState(Wrapped):
    """All streams share one state."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.state = inner.create_state()

    def create_state(self) -> Any:
        return self.state


class KeepsStateOnReset(Wrapped):
    """A state that was reset remembers its last stream."""

    def reset_state(self, state: Any) -> None:
        return


class ShowsSpecialTokens(Wrapped):
    """Special tokens appear in the text of a stream."""

    def decode_incremental_with_state(self, state: Any, token: int) -> str:
        piece = str(self.inner.decode_incremental_with_state(state, token))
        return piece or (str(self.inner.decode([token], False)) if self.inner.is_special_token(token) else "")
