"""Ids and texts of 3,000 strings per kind, here and by transformers from the same files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer

KINDS = ("byte-level", "byte-level-split", "byte-fallback", "unigram", "wordpiece", "word-level")


def assert_same(ours: HuggingFaceTokenizer, theirs: PreTrainedTokenizerBase, texts: list[str]) -> None:
    for add_special in (True, False):
        expected = theirs(texts, add_special_tokens=add_special)["input_ids"]
        for text, ids in zip(texts, expected, strict=True):
            assert ours.encode(text, add_special) == ids, ascii(text)
            if add_special:
                assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
                assert ours.decode(ids, False) == theirs.decode(ids)
    rng = random.Random(1)
    for _ in range(len(texts) // 2):
        ids = [rng.randrange(len(theirs)) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.clause("TK-ENCODE-1", "TK-ENCODE-2", "TK-DECODE-1", "TK-DECODE-3")
@pytest.mark.parametrize("kind", KINDS)
def test_strings(kind: str, directory_of: Callable[[str], Path], strings: list[str]) -> None:
    directory = directory_of(kind)
    assert_same(load_tokenizer(directory), AutoTokenizer.from_pretrained(directory), strings[:400])


@pytest.mark.slow
@pytest.mark.clause("TK-ENCODE-1", "TK-ENCODE-2", "TK-DECODE-1", "TK-DECODE-3")
@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_strings(kind: str, directory_of: Callable[[str], Path], strings: list[str]) -> None:
    directory = directory_of(kind)
    assert len(strings) == 3000
    assert_same(load_tokenizer(directory), AutoTokenizer.from_pretrained(directory), strings)


@pytest.mark.clause("TK-INFO-2", "TK-INFO-3", "TK-DIR-2")
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_and_role(kind: str, directory_of: Callable[[str], Path]) -> None:
    theirs = AutoTokenizer.from_pretrained(directory_of(kind))
    ours = load_tokenizer(directory_of(kind))
    added = theirs.added_tokens_decoder
    assert ours.vocab_size() == len(theirs)
    for token_id in range(len(theirs)):
        expected = added[token_id].content if token_id in added else theirs.convert_ids_to_tokens(token_id)
        assert ours.token_text(token_id) == expected
        assert ours.token_id(expected) == token_id
    special = ours.special_tokens()
    for role in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"):
        assert getattr(special, f"{role}_token") == getattr(theirs, f"{role}_token_id"), role


@pytest.fixture(scope="module")
def minilm() -> Path:
    import argparse

    from ferrum_ref.cli.cache import cache_dir
    from ferrum_ref.models.source import pull_model

    path = pull_model("all-minilm-l6-v2", cache_dir(argparse.Namespace(cache_dir=None)))
    return path if path.is_dir() else path.parent


@pytest.mark.model
@pytest.mark.clause("TK-ENCODE-1", "TK-DECODE-1", "TK-DECODE-3")
def test_a_real_wordpiece(minilm: Path, strings: list[str]) -> None:
    assert_same(load_tokenizer(minilm), AutoTokenizer.from_pretrained(minilm), strings[:400])


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.clause("TK-ENCODE-1", "TK-DECODE-1", "TK-DECODE-3")
def test_a_real_wordpiece_on_three_thousand(minilm: Path, strings: list[str]) -> None:
    assert_same(load_tokenizer(minilm), AutoTokenizer.from_pretrained(minilm), strings)
