"""Detokenisation token by token: text goes out when later tokens can no longer change it.

A token's text depends on its neighbours: bytes of one character may be split over tokens, and some decoders treat the
first token of a text differently.  So the new text is what `decode(context + pending)` adds to `decode(context)`, and
it is held back while it ends in U+FFFD, which may become a character yet.  Afterwards the pending tokens are the next
context, so a step costs two short decodes however long the stream is.

Source: vLLM's detokenize_incrementally (prefix and read offsets).  Clauses: TK-STREAM-1..5 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

Decode = Callable[[list[int]], str]

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING_TOKENS: Final = 16
_LONGEST_CHARACTER_TOKENS: Final = 4  # a UTF-8 character has at most four bytes


@dataclass(slots=True)
class DetokenizerState:
    """A stream under way: `context` and `context_text` are delivered, `pending` is not."""

    skip_special: bool = True
    context: list[int] = field(default_factory=list)
    context_text: str = ""
    pending: list[int] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the stream; keep the choice about special tokens."""
        self.context, self.context_text, self.pending, self.delivered = [], "", [], []

    def deliver(self, text: str) -> str:
        """Record and return delivered text."""
        if text:
            self.delivered.append(text)
        return text


def push(state: DetokenizerState, token: int, decode: Decode) -> str:
    """The text that becomes certain with `token`, which must not be one that `decode` ignores.  Mutates `state`."""
    state.pending.append(token)
    text = decode(state.context + state.pending)
    if text.endswith(REPLACEMENT):
        return _release_broken(state, text, decode) if len(state.pending) >= _MAX_PENDING_TOKENS else ""
    if len(text) <= len(state.context_text):
        if len(state.pending) >= _MAX_PENDING_TOKENS:
            state.pending = []  # tokens without text
        return ""
    new = text[len(state.context_text) :]
    state.context, state.pending = state.pending, []
    state.context_text = decode(state.context)
    return state.deliver(new)


def flush(state: DetokenizerState, decode: Decode) -> str:
    """What is still held back, incomplete characters as U+FFFD.  Mutates `state`."""
    if not state.pending:
        return ""
    new = decode(state.context + state.pending)[len(state.context_text) :]
    state.context, state.context_text, state.pending = [], "", []
    return state.deliver(new)


def _release_broken(state: DetokenizerState, text: str, decode: Decode) -> str:
    """Deliver the part of a long run of broken bytes that no later byte can mend.

    Behind a cut that splits no character, with at least four tokens to its right, the left part is final: a character
    that reached over the cut would have to end within them.  One of four neighbouring cuts is such a cut.
    """
    window = state.context + state.pending
    for tail in range(_LONGEST_CHARACTER_TOKENS, 2 * _LONGEST_CHARACTER_TOKENS):
        head_text = decode(window[:-tail])
        if len(head_text) >= len(state.context_text) and head_text + decode(window[-tail:]) == text:
            new = head_text[len(state.context_text) :]
            state.context, state.context_text, state.pending = [], "", window[-tail:]
            return state.deliver(new)
    return ""
