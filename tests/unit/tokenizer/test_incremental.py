"""Streams: deltas that join to the whole text, no half characters, a cost that does not grow."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.tokenizer import HuggingFaceTokenizer, incremental, load_tokenizer
from ferrum_ref.tokenizer.incremental import DetokenizerState

REPLACEMENT = "\ufffd"


def stream(tokenizer: HuggingFaceTokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    state = tokenizer.create_state(skip_special)
    deltas = [tokenizer.decode_incremental_with_state(state, token) for token in ids]
    deltas.append(tokenizer.flush(state))
    assert tokenizer.get_decoded_text(state) == "".join(deltas)
    return deltas


# Bytes that begin, continue and break characters come up much more often than by chance.
TRICKY_BYTES = st.one_of(
    st.sampled_from([0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xEF, 0xBB, 0xBF, 0xBD, 0xF0]),
    st.sampled_from([0x9F, 0x98, 0x80, 0xF4, 0x90, 0xF8, 0xFF]),
    st.integers(0, 255),
)


@pytest.mark.clause("TK-STREAM-1", "TK-STREAM-2")
@given(data=st.lists(TRICKY_BYTES, max_size=80))
def test_any_bytes_join_to_the_whole(raw_bytes: HuggingFaceTokenizer, data: list[int]) -> None:
    """For byte ids the whole is what Python's own decoder makes of them; every prefix of the stream is final."""
    whole = bytes(data).decode("utf-8", "replace")
    deltas = stream(raw_bytes, data)
    assert "".join(deltas) == raw_bytes.decode(data, True) == whole
    for count in range(len(deltas)):
        assert whole.startswith("".join(deltas[:count]))


@pytest.mark.clause("TK-STREAM-1", "TK-STREAM-2")
@given(text=st.text())
def test_text_split_into_bytes_has_no_half_characters(raw_bytes: HuggingFaceTokenizer, text: str) -> None:
    deltas = stream(raw_bytes, list(text.encode("utf-8")))
    assert "".join(deltas) == text
    assert sum(delta.count(REPLACEMENT) for delta in deltas) == text.count(REPLACEMENT)


@pytest.mark.clause("TK-STREAM-1")
def test_the_example_of_upstreams_defect(raw_bytes: HuggingFaceTokenizer) -> None:
    """D-23: the bytes C3 A9 of an e with an acute accent."""
    assert stream(raw_bytes, [0xC3, 0xA9, 0x21]) == ["", "é", "!", ""]
    assert stream(raw_bytes, [0x61, 0xC3]) == ["a", "", REPLACEMENT]


@pytest.mark.clause("TK-STREAM-1", "TK-STREAM-3")
@pytest.mark.parametrize("skip_special", [True, False])
def test_special_and_unknown_ids(raw_bytes: HuggingFaceTokenizer, skip_special: bool) -> None:
    """They neither break a character nor end one."""
    ids = [256, 0xE2, 256, 0x82, 70_000, 0xAC, 256]
    deltas = stream(raw_bytes, ids, skip_special)
    assert "".join(deltas) == raw_bytes.decode(ids, skip_special)
    if skip_special:
        assert deltas == ["", "", "", "", "", "€", "", ""]


@pytest.mark.clause("TK-STREAM-1")
def test_ids_that_are_none(raw_bytes: HuggingFaceTokenizer) -> None:
    for token in (-1, 2**32):
        with pytest.raises(InvalidParameterError, match=f"token id: got {token}"):
            raw_bytes.decode_incremental_with_state(raw_bytes.create_state(), token)


@pytest.mark.clause("TK-STREAM-3", "TK-STREAM-2")
@pytest.mark.parametrize("kind", ["text", "broken", "special"])
def test_cost_is_linear(kind: str, raw_bytes: HuggingFaceTokenizer) -> None:
    """Tokens handed to the decoder, for a stream ten times as long: ten times as many."""
    choices = {"text": list(b"plain text \xc3\xa9"), "broken": [0x80, 0xBF, 0xA0], "special": [256]}[kind]
    costs = []
    for length in (1_000, 10_000):
        rng, state, cost = random.Random(0), DetokenizerState(), 0

        def decode(ids: list[int]) -> str:
            nonlocal cost
            cost += len(ids)
            return raw_bytes.decode(ids, True)

        held = 0
        for _ in range(length):
            token = rng.choice(choices)
            if kind != "special":
                incremental.push(state, token, decode)
            held = max(held, len(state.context) + len(state.pending))
        costs.append(cost)
        assert held <= 32
    assert costs[1] <= 11 * costs[0]


@pytest.mark.clause("TK-STREAM-1")
@given(text=st.text(alphabet=st.sampled_from("ab é€🙂ß"), max_size=30))
def test_byte_fallback(fallback_bytes: HuggingFaceTokenizer, text: str) -> None:
    """Sentencepiece style: leading space stripped once, characters without a piece as runs of byte tokens."""
    tokenizer = fallback_bytes
    ids: list[int] = []
    for character in " " + text:
        piece = "▁" if character == " " else character
        found = tokenizer.token_id(piece)
        ids += [found] if found is not None else [1 + byte for byte in character.encode()]
    deltas = stream(tokenizer, ids)
    assert "".join(deltas) == text == tokenizer.decode(ids, True)
    assert not any(REPLACEMENT in delta for delta in deltas)


@pytest.mark.clause("TK-STREAM-4")
@given(data=st.lists(TRICKY_BYTES, min_size=1, max_size=30))
def test_the_stateless_form_is_the_last_delta(raw_bytes: HuggingFaceTokenizer, data: list[int]) -> None:
    deltas = stream(raw_bytes, data)[:-1]
    assert raw_bytes.decode_incremental(data[:-1], data[-1]) == deltas[-1]


@pytest.mark.clause("TK-STREAM-5")
def test_reset_and_flush(raw_bytes: HuggingFaceTokenizer) -> None:
    state = raw_bytes.create_state()
    for token in b"a\xe2":
        raw_bytes.decode_incremental_with_state(state, token)
    assert raw_bytes.get_decoded_text(state) == "a"
    assert raw_bytes.flush(state) == REPLACEMENT
    assert raw_bytes.flush(state) == ""
    assert raw_bytes.decode_incremental_with_state(state, ord("b")) == "b"
    assert raw_bytes.get_decoded_text(state) == f"a{REPLACEMENT}b"
    raw_bytes.reset_state(state)
    assert (raw_bytes.get_decoded_text(state), raw_bytes.flush(state)) == ("", "")
    assert raw_bytes.decode_incremental_with_state(state, ord("c")) == "c"


@pytest.mark.model
@pytest.mark.clause("TK-STREAM-1", "TK-STREAM-2")
def test_the_real_vocabulary(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    rng = random.Random(7)
    for length in (1, 2, 5, 50, 2_000, 2_000):
        ids = [rng.randrange(tokenizer.vocab_size()) for _ in range(length)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, True)
    for text in ("Grüße, 世界! 🙂👩‍👩‍👧 𝔘𝔫𝔦", "हिन्दी עברית ไทย\n\t  code()", "🏳️‍🌈" * 20):
        deltas = stream(tokenizer, tokenizer.encode(text, False))
        assert "".join(deltas) == text
        assert not any(REPLACEMENT in delta for delta in deltas)
