"""Streams over trained vocabularies: the text of every prefix, whatever the decoder."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer

KINDS = ("byte-level", "byte-level-split", "byte-fallback", "unigram", "wordpiece", "word-level")
REPLACEMENT = "\ufffd"


def check_prefixes(tokenizer: HuggingFaceTokenizer, ids: list[int], skip_special: bool, text: str | None) -> None:
    """Delivered text is final, and with what a flush would add it is the whole text of the prefix.

    `text`: what the ids were made of; a U+FFFD that is not in it may only come at the end.
    """
    state = tokenizer.create_state(skip_special)
    delivered = ""
    whole = tokenizer.decode(ids, skip_special)
    for count, token in enumerate(ids, 1):
        delivered += tokenizer.decode_incremental_with_state(state, token)
        assert whole.startswith(delivered), (ids, count)
        if text is not None and REPLACEMENT not in text:
            assert REPLACEMENT not in delivered
        rest = tokenizer.flush(copy.deepcopy(state))
        assert delivered + rest == tokenizer.decode(ids[:count], skip_special), (ids, count)
    assert delivered + tokenizer.flush(state) == whole
    assert tokenizer.get_decoded_text(state) == whole


def check(tokenizer: HuggingFaceTokenizer, texts: list[str], num_random: int) -> None:
    for place, text in enumerate(texts):
        check_prefixes(tokenizer, tokenizer.encode(text, True), place % 2 == 0, text)
    rng = random.Random(3)
    for _ in range(num_random):
        ids = [rng.randrange(tokenizer.vocab_size() + 3) for _ in range(rng.randrange(1, 14))]
        check_prefixes(tokenizer, ids, rng.random() < 0.5, None)


@pytest.mark.clause("TK-STREAM-1", "TK-STREAM-2", "TK-STREAM-6", "TK-STREAM-7")
@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix(kind: str, directory_of: Callable[[str], Path], strings: list[str]) -> None:
    check(load_tokenizer(directory_of(kind)), strings[:60] + strings[-40:], 120)


@pytest.mark.slow
@pytest.mark.clause("TK-STREAM-1", "TK-STREAM-2", "TK-STREAM-6", "TK-STREAM-7")
@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_three_thousand(kind: str, directory_of: Callable[[str], Path], strings: list[str]) -> None:
    check(load_tokenizer(directory_of(kind)), strings, 3000)


@pytest.mark.clause("TK-STREAM-6")
def test_bytes_of_a_run_that_breaks(directory_of: Callable[[str], Path]) -> None:
    """A run of bytes is text as a whole or not at all, so nothing of it goes out before it ends."""
    tokenizer = load_tokenizer(directory_of("byte-fallback"))
    euro = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    letter, stray = tokenizer.token_id("a"), tokenizer.token_id("<0xFF>")
    for ids, deltas in (
        ([*euro, letter], ["", "", "", "€a"]),
        ([*euro, stray, letter], [*[""] * 4, REPLACEMENT * 4 + "a"]),
    ):
        state = tokenizer.create_state()
        assert [tokenizer.decode_incremental_with_state(state, int(token or 0)) for token in ids] == deltas
        assert tokenizer.decode([int(token or 0) for token in ids], True) == "".join(deltas)


@pytest.mark.clause("TK-STREAM-6", "TK-STREAM-3")
def test_a_long_run_is_cheap(directory_of: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(directory_of("byte-fallback"))
    state = tokenizer.create_state()
    byte = int(tokenizer.token_id("<0xE2>") or 0)
    decoded: list[int] = []
    backend = tokenizer._decode
    tokenizer._decode = lambda ids, skip: decoded.append(len(ids)) or backend(ids, skip)  # type: ignore[method-assign, func-returns-value]
    for _ in range(20_000):
        assert tokenizer.decode_incremental_with_state(state, byte) == ""
    assert decoded == []
    assert tokenizer.flush(state) == REPLACEMENT * 20_000
    assert sum(decoded) <= 20_000


@pytest.mark.clause("TK-STREAM-7", "TK-DECODE-3")
def test_spaces_that_are_cleaned_up(directory_of: Callable[[str], Path]) -> None:
    """A word goes out when the next one has begun; punctuation joins it."""
    tokenizer = load_tokenizer(directory_of("word-level"))
    ids = [int(tokenizer.token_id(word) or 0) for word in ("the", "name", ".", "is", ",")]
    state = tokenizer.create_state()
    deltas = [tokenizer.decode_incremental_with_state(state, token) for token in ids]
    assert deltas == ["", "the", " name", ".", " is"]
    assert tokenizer.flush(state) == ","
    assert tokenizer.decode(ids, True) == "the name. is,"
