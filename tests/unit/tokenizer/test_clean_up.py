"""Spaces before punctuation, taken out at once and piece by piece."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ferrum_ref.tokenizer.clean_up import clean_up, split_final
from ferrum_ref.tokenizer.incremental import DetokenizerState

TEXTS = st.text(alphabet=st.sampled_from(" .'nmtsvre,!?a"), max_size=24)


@pytest.mark.clause("TK-DECODE-3")
@settings(max_examples=200)
@given(text=TEXTS)
def test_as_transformers_cleans_up(text: str, theirs: PreTrainedTokenizerFast) -> None:
    assert clean_up(text) == theirs.clean_up_tokenization(text)


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.clause("TK-STREAM-7")
@settings(max_examples=400)
@given(text=TEXTS, sizes=st.lists(st.integers(1, 5), max_size=24))
@example(text="do n ' t", sizes=[4])
@example(text="it ' s", sizes=[2, 2])
@example(text="  ' s", sizes=[1] * 5)
def test_pieces_join_to_the_whole(text: str, sizes: list[int]) -> None:
    state = DetokenizerState(clean_spaces=True)
    place = 0
    for size in sizes:
        state.deliver(text[place : place + size])
        place += size
        assert clean_up(text).startswith("".join(state.delivered))
    state.deliver(text[place:], at_end=True)
    assert "".join(state.delivered) == clean_up(text)


@pytest.mark.clause("TK-STREAM-7")
@given(head=TEXTS, tail=TEXTS)
def test_a_head_stays_what_it_is(head: str, tail: str) -> None:
    final, rest = split_final(head)
    assert final + rest == head
    assert clean_up(final) + clean_up(rest + tail) == clean_up(head + tail)


@pytest.mark.clause("TK-STREAM-7")
def test_a_word_is_held_back_no_longer_than_needed() -> None:
    assert split_final("the name of") == ("the name", " of")
    assert split_final("name.") == ("", "name.")
