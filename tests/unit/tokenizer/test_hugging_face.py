"""The adapter: ids and texts as the library gives them, special ids, sizes, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from ferrum_ref.errors import InvalidParameterError, TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage, TokenizerType
from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import SpecialTokens


@pytest.fixture
def tokenizer(byte_backend: Tokenizer) -> HuggingFaceTokenizer:
    byte_backend.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", special_tokens=[("<bos>", byte_backend.token_to_id("<bos>"))]
    )
    return HuggingFaceTokenizer(
        byte_backend,
        special_tokens=SpecialTokens(bos_token=TokenId(260), eos_token=TokenId(261)),
        stop_token_ids=[7],
        model_name="tiny",
    )


@pytest.mark.clause("TK-ENCODE-1", "TK-ENCODE-2", "TK-DECODE-1")
def test_ids_worked_out_by_hand(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.encode("hello é", False) == [259, ord(" "), 0xC3, 0xA9]
    assert tokenizer.encode("hello", True) == [260, 259]
    assert tokenizer.encode("he<eos><tool>", False) == [256, 261, 263]
    assert tokenizer.encode("", False) == []
    assert tokenizer.decode([260, 259, 261, 263], True) == "hello<tool>"
    assert tokenizer.decode([260, 259, 261], False) == "<bos>hello<eos>"


@pytest.mark.clause("TK-ENCODE-1")
def test_truncation_and_padding_of_the_file_are_off(byte_backend: Tokenizer) -> None:
    byte_backend.enable_truncation(3)
    byte_backend.enable_padding(length=10)
    assert HuggingFaceTokenizer(byte_backend).encode("abcdef", True) == list(b"abcdef")


@pytest.mark.clause("TK-ENCODE-3")
def test_lone_surrogates(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800", False)


@pytest.mark.clause("TK-ENCODE-3")
def test_bytes_without_a_token_are_left_out() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert HuggingFaceTokenizer(backend).encode("a\x00b", False) == [0, 1]


@pytest.mark.clause("TK-DECODE-2")
def test_ids_beyond_the_vocabulary(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.decode([104, 70_000, 2**32 - 1, 105], True) == "hi"
    for wrong in (-1, 2**32):
        with pytest.raises(InvalidParameterError, match=f"token id: got {wrong}, expected one in"):
            tokenizer.decode([104, wrong], True)


@pytest.mark.clause("TK-DECODE-2", "TK-STREAM-1")
@pytest.mark.parametrize("wrong", [1.0, "a", None])
def test_ids_that_are_no_integers(tokenizer: HuggingFaceTokenizer, wrong: Any) -> None:
    with pytest.raises(InvalidParameterError, match=f"token id: got {wrong!r}, expected an integer"):
        tokenizer.decode([104, wrong], True)
    with pytest.raises(InvalidParameterError, match=f"token id: got {wrong!r}, expected an integer"):
        tokenizer.decode_incremental_with_state(tokenizer.create_state(), wrong)
    assert tokenizer.decode(np.array([104, 105], np.uint32), True) == "hi"


@pytest.mark.clause("TK-ENCODE-4")
@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel(vocab={"a": 0}, unk_token="[UNK]"),
        models.WordPiece(vocab={"a": 0}, unk_token="[UNK]"),
        models.Unigram(vocab=[("a", 0.0)]),
    ],
    ids=["wordlevel", "wordpiece", "unigram"],
)
def test_text_that_no_token_stands_for(model: models.Model) -> None:
    tokenizer = HuggingFaceTokenizer(Tokenizer(model))
    assert tokenizer.encode("a", False) == [0]
    with pytest.raises(TokenizerError, match=r"encode: text: .*expected text that the vocabulary can spell") as caught:
        tokenizer.encode("b", False)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("TK-INFO-3")
def test_lookups_of_what_no_vocabulary_spells(byte_backend: Tokenizer) -> None:
    byte_backend.normalizer = normalizers.Lowercase()
    byte_backend.add_tokens([AddedToken("Read Me", normalized=True)])
    tokenizer = HuggingFaceTokenizer(byte_backend)
    assert tokenizer.token_id("\ud800") is None
    assert tokenizer.token_text(264) == "Read Me"
    assert tokenizer.token_id("Read Me") == 264


@pytest.mark.clause("TK-INFO-1", "TK-INFO-2", "TK-INFO-3")
def test_metadata(tokenizer: HuggingFaceTokenizer) -> None:
    info = tokenizer.info()
    assert info.tokenizer_type is TokenizerType.BPE
    assert info.vocab_size == tokenizer.vocab_size() == 264  # D-78: with the four added tokens
    assert (info.max_token_length, info.supports_incremental, info.supports_chat_template) == (6, True, False)
    assert info.model_name == "tiny"
    assert tokenizer.token_id("hello") == 259
    assert tokenizer.token_id("Hello") is None
    assert tokenizer.token_text(259) == "hello"
    assert [tokenizer.token_text(wrong) for wrong in (264, -1, 2**32)] == [None] * 3
    for token_id in range(tokenizer.vocab_size()):
        assert tokenizer.token_id(str(tokenizer.token_text(token_id))) == token_id


@pytest.mark.clause("TK-INFO-1")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.WordPiece(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"), TokenizerType.WordPiece),
        (models.Unigram(vocab=[("a", 0.0)], unk_id=0), TokenizerType.SentencePiece),
        (models.WordLevel(vocab={"a": 0}, unk_token="a"), TokenizerType.Custom),
    ],
    ids=["wordpiece", "unigram", "wordlevel"],
)
def test_algorithms(model: models.Model, expected: TokenizerType) -> None:
    assert HuggingFaceTokenizer(Tokenizer(model)).info().tokenizer_type is expected


@pytest.mark.clause("TK-SPECIAL-1")
def test_special_ids() -> None:
    """D-26: with no pad token, upstream's answers are the reverse of both lines marked so."""
    backend = Tokenizer(models.WordLevel(vocab={"a": 0, "[SEP]": 1, "[EOS]": 2}, unk_token="a"))
    backend.add_special_tokens(["[CLS]"])
    tokenizer = HuggingFaceTokenizer(backend, special_tokens=SpecialTokens(sep_token=TokenId(1), eos_token=TokenId(2)))
    assert not tokenizer.is_special_token(2**32 - 1)  # D-26
    assert tokenizer.is_special_token(1)  # D-26
    assert [tokenizer.is_special_token(token) for token in (0, 2, 3)] == [False, True, True]


@pytest.mark.clause("TK-SPECIAL-2")
def test_stop_ids(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.stop_token_ids == {7, 261}


@pytest.mark.clause("TK-CHAT-1")
def test_without_a_template_the_plain_form(tokenizer: HuggingFaceTokenizer) -> None:
    messages = [ChatMessage.system("Be brief."), ChatMessage.user("hi"), ChatMessage.assistant("ho \n")]
    plain = "system: Be brief.\nuser: hi\nassistant: ho"
    assert tokenizer.apply_chat_template(messages) == plain
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == plain
    assert tokenizer.apply_chat_template([]) == ""


@pytest.mark.model
@pytest.mark.clause("TK-SPECIAL-1", "TK-SPECIAL-2", "TK-INFO-1")
def test_the_real_tokenizer(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    special = tokenizer.special_tokens()
    assert (special.bos_token, special.eos_token, special.pad_token, special.unk_token) == (1, 2, 2, 0)
    assert tokenizer.stop_token_ids == {2}
    assert tokenizer.is_special_token(16)  # <empty_output>: type 3 in the file
    assert not tokenizer.is_special_token(17)
    assert tokenizer.info().supports_chat_template
