"""Tokenizers rebuilt from GGUF metadata, against textbook byte-pair encoding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumError, InvalidFormatError, InvalidParameterError, NotFoundError, UnsupportedError
from ferrum_ref.formats.gguf import GgufFile
from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer
from ferrum_ref.tokenizer.byte_level import PRE_KINDS
from ferrum_ref.tokenizer.from_gguf import tokenizer_from_gguf

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
SPELLING = [chr(byte) if byte in SHOWN else chr(256 + HIDDEN.index(byte)) for byte in range(256)]


def gpt2_words(text: str) -> list[str]:
    return regex.findall(GPT2_SPLIT, text)


def smollm_words(text: str) -> list[str]:
    """Every digit on its own, the rest as in GPT-2."""
    parts = [part for part in regex.split(r"(\p{N})", text) if part]
    return [word for part in parts for word in ([part] if regex.fullmatch(r"\p{N}", part) else gpt2_words(part))]


def llama3_words(text: str) -> list[str]:
    return regex.findall(LLAMA3_SPLIT, text)


class Textbook:
    """Sennrich, Haddow & Birch 2016, algorithm 1 at inference: merge the pair of lowest rank until none is left."""

    def __init__(self, tokens: tuple[str, ...], merges: tuple[str, ...], words: Callable[[str], list[str]]) -> None:
        self.ids = {text: token_id for token_id, text in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.words = words

    def encode(self, text: str, whole_words: bool = False) -> list[int]:
        return [token_id for word in self.words(text) for token_id in self._word(word, whole_words)]

    def _word(self, word: str, whole_words: bool) -> list[int]:
        spelt = "".join(SPELLING[byte] for byte in word.encode())
        if whole_words and spelt in self.ids:
            return [self.ids[spelt]]
        parts = [character for character in spelt if character in self.ids]
        while True:
            ranked = [(self.ranks.get((a, b), None), i) for i, (a, b) in enumerate(pairwise(parts))]
            possible = [(rank, i) for rank, i in ranked if rank is not None]
            if not possible:
                return [self.ids[part] for part in parts]
            _, i = min(possible)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


MERGES = ("h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "' s", "t h", "th e", "Ġ the", "Ċ Ċ", "w o", "r l", "rl d")


def metadata(**changes: Any) -> dict[str, Any]:
    merged = tuple(dict.fromkeys(merge.replace(" ", "") for merge in MERGES))
    tokens = ("<|begin|>", "<|end|>", "<tool>", *SPELLING, *merged, "Ġworld")
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 3, 4] + [1] * (len(tokens) - 3), np.int32),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2**32 - 1,
    }
    return {key: value for key, value in {**found, **_full(changes)}.items() if value is not None}


def _full(changes: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in changes.items()}


TEXTS = st.one_of(
    st.text(alphabet=st.sampled_from("hello world 12's\n\tthe's ÉÜ٣²🙂世"), max_size=40), st.text(max_size=30)
)


@pytest.mark.clause("TK-GGUF-1")
@pytest.mark.parametrize(
    ("pre", "words"), [("smollm", smollm_words), ("gpt-2", gpt2_words), ("llama-bpe", llama3_words)]
)
@settings(max_examples=150)
@given(text=TEXTS)
def test_ids_are_the_textbooks(pre: str, words: Callable[[str], list[str]], text: str) -> None:
    facts = metadata(pre=pre)
    textbook = Textbook(facts["tokenizer.ggml.tokens"], MERGES, words)
    ours = _tokenizer(pre)
    assert ours.encode(text, False) == textbook.encode(text, whole_words=pre == "llama-bpe")
    assert ours.decode(ours.encode(text, False), False) == text


_MADE: dict[str, HuggingFaceTokenizer] = {}


def _tokenizer(pre: str) -> HuggingFaceTokenizer:
    if pre not in _MADE:
        _MADE[pre] = tokenizer_from_gguf(metadata(pre=pre))
    return _MADE[pre]


@pytest.mark.clause("TK-GGUF-1")
def test_families_differ_where_they_should() -> None:
    """Digits stand alone in smollm; llama-bpe takes a word that is a token whole, though no merge builds it."""
    text = "12 world"
    spelt = {pre: [_tokenizer(pre).token_text(i) for i in _tokenizer(pre).encode(text, False)] for pre in _PRES}
    assert spelt["smollm"] == ["1", "2", "Ġ", "wo", "rld"]
    assert spelt["gpt-2"] == ["12", "Ġ", "wo", "rld"]
    assert spelt["llama-bpe"] == ["12", "Ġworld"]


_PRES = ("smollm", "gpt-2", "llama-bpe")


@pytest.mark.clause("TK-GGUF-2", "TK-GGUF-4")
def test_special_and_added_tokens() -> None:
    tokenizer = _tokenizer("smollm")
    assert tokenizer.encode("<|begin|>he<tool>", False)[0::2] == [0, 2]
    assert tokenizer.decode([0, 2, 1], True) == "<tool>"
    assert [tokenizer.is_special_token(i) for i in range(4)] == [True, True, False, False]
    special = tokenizer.special_tokens()
    assert (special.bos_token, special.eos_token, special.pad_token, special.unk_token) == (0, 1, None, None)


@pytest.mark.clause("TK-GGUF-3")
def test_what_stands_around_a_text() -> None:
    def around(**changes: Any) -> list[int]:
        return tokenizer_from_gguf(metadata(**changes)).encode("A", True)

    inner = 3 + SPELLING.index("A")
    assert around() == [inner]
    assert around(pre="llama-bpe") == [0, inner]
    assert around(pre="llama-bpe", add_bos_token=False) == [inner]
    assert around(add_bos_token=True) == [0, inner]
    assert around(add_bos_token=True, add_eos_token=True) == [0, inner, 1]
    assert around(add_eos_token=True) == [inner, 1]
    assert around(add_bos_token=True, bos_token_id=None) == [inner]


@pytest.mark.clause("TK-SPECIAL-2", "TK-GGUF-4")
def test_every_end_stops() -> None:
    assert tokenizer_from_gguf(metadata(eot_token_id=2, eom_token_id=2**32 - 1)).stop_token_ids == {1, 2}
    assert tokenizer_from_gguf(metadata(eos_token_id=None)).stop_token_ids == frozenset()


@pytest.mark.clause("TK-CHAT-2")
def test_the_template_sees_the_files_special_tokens() -> None:
    from ferrum_ref.interfaces.tokenizer import ChatMessage

    tokenizer = tokenizer_from_gguf(metadata(chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"))
    assert tokenizer.apply_chat_template([ChatMessage.user("x")]) == "<|begin|>x<|end|>"


@pytest.mark.clause("TK-GGUF-6", "TK-CHAT-9")
def test_named_templates() -> None:
    facts = metadata(chat_template="plain") | {"tokenizer.chat_template.tool_use": "{{ eos_token }}"}
    tokenizer = tokenizer_from_gguf(facts | {"tokenizer.chat_templates": ("tool_use",), "tokenizer.chat_template.x": 1})
    assert tokenizer.apply_chat_template([]) == "plain"
    assert tokenizer.apply_chat_template([], tools=[]) == "<|end|>"
    assert set(tokenizer.named_chat_templates) == {"tool_use"}


@pytest.mark.clause("TK-GGUF-5")
def test_the_default_kind_keeps_numbers_together() -> None:
    """llama.cpp's "default" would cut 12345! into 123, 45 and !."""
    tokenizer = tokenizer_from_gguf(metadata(pre="default"))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("12", False)] == ["12"]
    pieces = PRE_KINDS["default"].pre_tokenizer().pre_tokenize_str("12345!?")
    assert [piece for piece, _ in pieces] == ["12345", "!?"]


@pytest.mark.clause("TK-GGUF-2", "TK-SPECIAL-1")
def test_a_role_is_special_unless_its_token_is_ordinary() -> None:
    """Some files name an ordinary token for unknown text; in a text it is what it looks like."""
    exclamation = 3 + SPELLING.index("!")
    typed = tokenizer_from_gguf(metadata(unknown_token_id=exclamation))
    assert typed.decode(typed.encode("a!", False), True) == "a!"
    assert typed.special_tokens().unk_token == exclamation
    untyped = tokenizer_from_gguf(metadata(unknown_token_id=exclamation, token_type=None))
    assert untyped.decode(untyped.encode("a!", False), True) == "a"


@pytest.mark.clause("TK-GGUF-1", "TK-GGUF-2")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model": "rwkv"},
            UnsupportedError,
            "tokenizer.ggml.model: got 'rwkv', expected one of gpt2, llama, t5, bert",
        ),
        ({"model": None}, InvalidFormatError, "tokenizer.ggml.model: got NoneType"),
        ({"pre": "kimi-k2"}, UnsupportedError, "tokenizer.ggml.pre: got 'kimi-k2', expected one of default, gpt-2"),
        ({"pre": None}, InvalidFormatError, "tokenizer.ggml.pre: got NoneType, expected a string"),
        ({"tokens": None}, InvalidFormatError, "tokens: got NoneType, expected an array of strings"),
        ({"tokens": ()}, InvalidFormatError, "tokens: got tuple"),
        ({"tokens": ("a", "b", "a")}, InvalidFormatError, "token_type: got .* entries, expected one for each of 3"),
        ({"tokens": ("a", "b", "a"), "token_type": None}, InvalidFormatError, "tokens: got 'a' twice"),
        ({"token_type": (1, "x")}, InvalidFormatError, "token_type: got tuple, expected an array of integers"),
        ({"token_type": 3}, InvalidFormatError, "token_type: got int"),
        ({"merges": None}, InvalidFormatError, "merges: got NoneType"),
        ({"merges": ("he",)}, InvalidFormatError, "merges: got 'he' at 0, expected two tokens"),
        ({"merges": ("h e", "h e l")}, InvalidFormatError, "merges: got 'h e l' at 1"),
        ({"merges": ("h nonsense",)}, InvalidFormatError, "merges: .*nonsense.* out of vocabulary"),
        ({"eos_token_id": 10**6}, InvalidFormatError, "eos_token_id: got 1000000, expected an id below"),
        ({"bos_token_id": "0"}, InvalidFormatError, "bos_token_id: got '0'"),
        ({"add_bos_token": 1}, InvalidFormatError, "add_bos_token: got 1, expected true or false"),
    ],
)
def test_refusals_are_named(changes: dict[str, Any], error: type[FerrumError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tokenizer_from_gguf(metadata(**changes))
    assert "\n" not in str(caught.value)


def write_vocabulary(path: Path, rows: int | None = None) -> Path:
    facts = metadata()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(facts["tokenizer.ggml.tokens"]))
    writer.add_token_types(facts["tokenizer.ggml.token_type"].tolist())
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(1)
    if rows is not None:
        writer.add_tensor("token_embd.weight", np.zeros((rows, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.clause("TK-LOAD-1", "TK-GGUF-2")
def test_loading_from_files(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", rows=300)
    for place in (path, tmp_path, str(path)):
        assert load_tokenizer(place).encode("hello", False) == _tokenizer("smollm").encode("hello", False)
    with pytest.raises(InvalidFormatError, match=r"tokens: got 274 tokens, expected at most the 100 rows"):
        load_tokenizer(write_vocabulary(tmp_path / "b.gguf", rows=100))
    with pytest.raises(InvalidParameterError, match="got 2 GGUF files, expected one"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError, match="no such file or directory"):
        load_tokenizer(tmp_path / "absent.gguf")


@pytest.mark.clause("TK-GGUF-2")
@settings(max_examples=200)
@given(data=st.data())
def test_damaged_vocabularies(data: st.DataObject, vocabulary_bytes: bytes, damaged_path: Path) -> None:
    content = bytearray(vocabulary_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(24, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged_path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(damaged_path)
        assert isinstance(tokenizer.decode(tokenizer.encode("hello world 12's", True), True), str)
    except FerrumError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@pytest.fixture(scope="module")
def vocabulary_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf").read_bytes()


@pytest.fixture(scope="module")
def damaged_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "v.gguf"


REAL_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn x**2  # 3.14159, 1234567890\r\n\r\n",
    "Grüße aus Köln, ça va? Ça va bien; наша 世界 ünïcödé 🙂👍🏽",
    "don't won't I'll we've HE'S   spaces   \n\n\n  tabs\t\t",
    "<|im_start|>user\nhi<|im_end|>",
    "𝟘𝟙𝟚 ٣٤٥ ²³ Ⅻ ½",
    "",
    " ",
    "  leading and trailing  ",
)


@pytest.mark.model
@pytest.mark.clause("TK-GGUF-1")
def test_the_real_vocabulary_is_the_textbooks(smollm2_path: Path) -> None:
    with GgufFile(smollm2_path) as file:
        tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, tuple)
    assert isinstance(merges, tuple)
    textbook = Textbook(tokens, merges, smollm_words)
    tokenizer = load_tokenizer(smollm2_path)
    for text in REAL_TEXTS:
        if "<|" in text:
            assert tokenizer.encode(text, True)[0] == 1
            assert tokenizer.encode(text, True)[-1] == 2
        else:
            assert tokenizer.encode(text, True) == textbook.encode(text), text
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(chr(c) for c in rng.choice([*range(32, 127), *range(0xC0, 0x250), 0x4E16, 0x1F642], 30))
        assert tokenizer.encode(text, False) == textbook.encode(text)
