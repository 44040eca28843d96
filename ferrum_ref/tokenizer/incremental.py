"""Detokenisation token by token: text goes out when later tokens can no longer change it.

A token's text depends on its neighbours: bytes of one character may be split over tokens, and some decoders treat the
first token of a text differently.  So the new text is what `decode(context + pending)` adds to `decode(context)`, and
it is held back while it ends in U+FFFD, which may become a character yet.  Afterwards the pending tokens are the next
context, so a step costs two short decodes however long the stream is.

Byte-fallback decoders turn a run of byte tokens into text as a whole, and into U+FFFD for every byte if the run is not
UTF-8: while a run is open nothing of it is certain, so it is held back, without decoding, until it ends.

Source: vLLM's detokenize_incrementally (prefix and read offsets).  Clauses: TK-STREAM-1..7 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ferrum_ref.tokenizer.clean_up import clean_up, split_final

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
    clean_spaces: bool = False
    unclean: str = ""  # decoded text that the clean-up of spaces may still change

    def reset(self) -> None:
        """Forget the stream; keep the choices about special tokens and spaces."""
        self.context, self.context_text, self.pending, self.delivered, self.unclean = [], "", [], [], ""

    def deliver(self, text: str, at_end: bool = False) -> str:
        """Record and return what is final with `text`, cleaned up where the stream asks for it."""
        if self.clean_spaces:
            final, self.unclean = (self.unclean + text, "") if at_end else split_final(self.unclean + text)
            text = clean_up(final)
        if text:
            self.delivered.append(text)
        return text


def push(state: DetokenizerState, token: int, decode: Decode, open_run: bool = False) -> str:
    """The text that becomes certain with `token`, which must not be one that `decode` ignores.  Mutates `state`.

    `open_run`: the token is a byte of a run whose text the next token may still change.
    """
    state.pending.append(token)
    if open_run:
        return ""
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
    new = decode(state.context + state.pending)[len(state.context_text) :] if state.pending else ""
    state.context, state.context_text, state.pending = [], "", []
    return state.deliver(new, at_end=True)


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
