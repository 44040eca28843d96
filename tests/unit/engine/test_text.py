"""Text of an answer: whole characters only, nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.engine.text import AnswerText
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer


@pytest.fixture(scope="session")
def tokenizer(tools) -> IncrementalTokenizer:  # type: ignore[no-untyped-def,type-arg]
    return tools.tokenizer()


@pytest.mark.clause("EN-TEXT-1")
def test_a_split_character_comes_out_whole(tokenizer: IncrementalTokenizer) -> None:  # type: ignore[type-arg]
    text = AnswerText(tokenizer, [])
    assert [text.feed(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert text.finish() == ""
    assert text.text() == "aé€"


@pytest.mark.clause("EN-TEXT-2")
def test_the_end_brings_what_was_held_back(tokenizer: IncrementalTokenizer) -> None:  # type: ignore[type-arg]
    text = AnswerText(tokenizer, ["abX"])
    assert [text.feed(b) for b in b"cab"] == ["c", "", ""]
    assert text.finish() == "ab"
    half = AnswerText(tokenizer, [])
    assert half.feed(0xC3) == ""
    assert half.finish() == "\ufffd"


@pytest.mark.clause("EN-TEXT-3")
def test_a_stop_string_may_end_inside_a_token_or_at_the_flush(tokenizer: IncrementalTokenizer) -> None:  # type: ignore[type-arg]
    text = AnswerText(tokenizer, ["b"])
    assert [text.feed(b) for b in b"abc"] == ["a", "", ""]
    assert (text.matched, text.finish(), text.text()) == ("b", "", "a")
    late = AnswerText(tokenizer, ["\ufffd"])
    late.feed(0xC3)
    assert (late.finish(), late.matched) == ("", "\ufffd")


@pytest.mark.clause("EN-TEXT-1", "EN-TEXT-2")
@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_add_up_to_the_text_before_the_stop(tokenizer, whole: str, stops: list[str]) -> None:  # type: ignore[no-untyped-def]
    text = AnswerText(tokenizer, stops)
    pieces = []
    for byte in whole.encode():
        pieces.append(text.feed(byte))
        if text.matched:
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text()
    assert "\ufffd" not in text.text() or "\ufffd" in whole
    cuts = [whole.find(s) for s in stops if s in whole]
    if text.matched:
        assert whole.startswith(text.text() + text.matched)
    else:
        assert not cuts
        assert text.text() == whole
