"""Laws of incremental detokenisation.  Clause: PA-ENGINE-4."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.engine.law import Law
from ferrum_ref.parity.engine.parts import EngineParts

TEXTS = (
    "hello, hello world",
    " leading and trailing ",
    "naïve café — “quotes”",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧 and 🇩🇪, hell o",
    "line\nbreaks\t and  spaces",
    "mixed ß→∞ he said hello",
)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def streams_equal_decoding(parts: EngineParts, rng: np.random.Generator) -> str:
    """Pieces joined are the decoded text; no piece holds half a character; what was delivered is never taken back."""
    tokenizer = parts.make_tokenizer()
    state = tokenizer.create_state()
    for text in rng.permutation(TEXTS).tolist():
        ids = tokenizer.encode(text, False)
        whole, delivered = tokenizer.decode(ids, True), ""
        for token in ids:
            piece = tokenizer.decode_incremental_with_state(state, token)
            delivered += piece
            if REPLACEMENT in piece:
                return f"a piece of {text!r} is half a character"
            if not whole.startswith(delivered):
                return f"{delivered!r} was delivered of {whole!r}"
            if tokenizer.get_decoded_text(state) != delivered:
                return f"get_decoded_text gives {tokenizer.get_decoded_text(state)!r}, delivered was {delivered!r}"
        delivered += tokenizer.flush(state)
        if delivered != whole:
            return f"the stream gave {delivered!r}, decoding gives {whole!r}"
        tokenizer.reset_state(state)
    return ""


def streams_are_independent(parts: EngineParts, rng: np.random.Generator) -> str:
    """All texts as streams side by side, token by token in turn: each gives its own text."""
    tokenizer = parts.make_tokenizer()
    texts = [str(text) for text in rng.permutation(TEXTS)]
    ids = [tokenizer.encode(text, False) for text in texts]
    states, delivered = [tokenizer.create_state() for _ in texts], [""] * len(texts)
    for step in range(max(map(len, ids))):
        for stream, tokens in enumerate(ids):
            if step < len(tokens):
                delivered[stream] += tokenizer.decode_incremental_with_state(states[stream], tokens[step])
    for stream, tokens in enumerate(ids):
        delivered[stream] += tokenizer.flush(states[stream])
        if delivered[stream] != tokenizer.decode(tokens, True):
            return f"of several streams one gave {delivered[stream]!r}"
    return ""


def broken_ends_are_flushed(parts: EngineParts, rng: np.random.Generator) -> str:
    """A stream that stops inside a character gives its bytes as U+FFFD when it is flushed, and special tokens never."""
    tokenizer = parts.make_tokenizer()
    ids = tokenizer.encode("ok 日", False)[:-1]
    special = int(tokenizer.special_tokens().eos_token or 0)
    ids = [*ids[:2], special, *ids[2:]]
    state = tokenizer.create_state()
    delivered = "".join(tokenizer.decode_incremental_with_state(state, token) for token in ids)
    if delivered != "ok ":
        return f"{delivered!r} was certain, expected 'ok '"
    end = tokenizer.flush(state)
    return "" if end and set(end) == {REPLACEMENT} else f"flush gave {end!r}, expected U+FFFD"


def order_is_kept(parts: EngineParts, rng: np.random.Generator) -> str:
    """Characters come out one by one, not all at the end: after each whole character it has been delivered."""
    tokenizer = parts.make_tokenizer()
    state = tokenizer.create_state()
    delivered = ""
    for token in tokenizer.encode("abcdefghij", False):
        before, delivered = delivered, delivered + tokenizer.decode_incremental_with_state(state, token)
        if delivered == before:
            return "a token of whole ASCII characters delivered nothing"
    return ""


STREAM_LAWS = (
    Law("tokenizer", "streams equal decoding", streams_equal_decoding),
    Law("tokenizer", "streams are independent", streams_are_independent),
    Law("tokenizer", "broken ends are flushed", broken_ends_are_flushed),
    Law("tokenizer", "text is not held back", order_is_kept),
)
