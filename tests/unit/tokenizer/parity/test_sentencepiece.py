"""SentencePiece vocabularies against the algorithm as it is written down: join the best neighbours, again and again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import sentencepiece_model_pb2_new as proto

from ferrum_ref.errors import FerrumError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer
from ferrum_ref.tokenizer.from_gguf import tokenizer_from_gguf
from ferrum_ref.tokenizer.sentencepiece_model import read_sentencepiece_model

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Reference:
    """sentencepiece's bpe_model.cc with llama.cpp's treatment of special tokens, without a thought for speed."""

    def __init__(
        self, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], prefix: bool = True
    ) -> None:
        self.ids = {text: token_id for token_id, text in enumerate(tokens)}
        self.scores, self.types, self.prefix = scores, types, prefix
        self.added = sorted(
            (text for text, i in self.ids.items() if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)),
            key=len,
            reverse=True,
        )

    def encode(self, text: str) -> list[int]:
        """The text cut at the added tokens, the leftmost first and the longest of those that begin there."""
        found: list[int] = []
        start = place = 0
        while place < len(text):
            token = next((token for token in self.added if text.startswith(token, place)), None)
            if token is None:
                place += 1
                continue
            found += [*self.fragment(text[start:place]), self.ids[token]]
            start = place = place + len(token)
        return found + self.fragment(text[start:])

    def fragment(self, text: str) -> list[int]:
        if not text:
            return []
        parts = list((" " * self.prefix + text).replace(" ", SPACE))
        while True:
            joins = [(-self.scores[i], place) for place in range(len(parts) - 1) if (i := self.join(parts, place)) >= 0]
            if not joins:
                return [token_id for part in parts for token_id in self.piece(part)]
            _, place = min(joins)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

    def join(self, parts: list[str], place: int) -> int:
        token_id = self.ids.get(parts[place] + parts[place + 1], -1)
        return token_id if token_id >= 0 and self.types[token_id] in (NORMAL, USER_DEFINED) else -1

    def piece(self, part: str) -> list[int]:
        if part in self.ids:
            return [self.ids[part]]
        return [self.ids[BYTES[byte]] for byte in part.encode()]


def metadata(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], /, **more: Any) -> dict[str, Any]:
    found = {"model": "llama", "tokens": tuple(tokens), "scores": scores, "token_type": types, "bos_token_id": 1}
    found |= {"eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in {**found, **more}.items() if value is not None}


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[float], list[int]]:
    pieces = list("abc" + SPACE)
    for _ in range(draw(st.integers(1, 14))):
        made = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        if len(made) < 9 and made not in pieces:
            pieces.append(made)
    tokens = ["<unk>", "<s>", "</s>", "<u>", "  ", *BYTES, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    ranks = draw(st.permutations(range(len(pieces))))
    return tokens, [0.0] * 261 + [-float(rank) for rank in ranks], types


@pytest.mark.clause("TK-SPM-1", "TK-SPM-2", "TK-SPM-3")
@given(vocabulary=vocabularies(), texts=st.lists(st.text("abc é", max_size=14), max_size=12), prefix=st.booleans())
def test_any_vocabulary(vocabulary: Any, texts: list[str], prefix: bool) -> None:
    ours = tokenizer_from_gguf(metadata(*vocabulary, add_space_prefix=prefix))
    reference = Reference(*vocabulary, prefix=prefix)
    for text in (*texts, *(f"{text}<u>{text}</s>" for text in texts)):
        ids = ours.encode(text, False)
        assert ids == reference.encode(text)
        assert ours.encode(text, True) == [1, *ids]
        if "<" not in text and "  " not in text:
            assert ours.decode(ids, True) == text


@pytest.fixture(scope="module")
def trained(directory_of: Callable[[str], Path]) -> tuple[list[str], list[float], list[int]]:
    """The trained byte-fallback vocabulary; a later merge has a lower score."""
    original = load_tokenizer(directory_of("byte-fallback"))
    tokens = [str(original.token_text(token_id)) for token_id in range(original.vocab_size())]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    return tokens, [0.0 if kind != NORMAL else 259.0 - i for i, kind in enumerate(types)], types


@pytest.fixture(scope="module")
def gguf_file(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, scores, types = trained
    path = tmp_path_factory.mktemp("spm") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_strings(ours: HuggingFaceTokenizer, path: Path, trained: Any, texts: list[str]) -> int:
    """Every text against the reference; against transformers too where it treats spaces as SentencePiece does."""
    reference = Reference(*trained)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    compared = 0
    for text in texts:
        ids = ours.encode(text, True)
        assert ids == [1, *reference.encode(text)], ascii(text)
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
        plain = not any(special in text for special in ("<s>", "</s>", "<unk>"))
        if plain and not text.startswith((" ", SPACE)):
            assert ids == theirs(text)["input_ids"], ascii(text)
            compared += 1
    return compared


@pytest.mark.clause("TK-SPM-1", "TK-SPM-2", "TK-SPM-3", "TK-GGUF-3")
def test_a_trained_vocabulary(gguf_file: Path, trained: Any, strings: list[str]) -> None:
    texts = [text for text in strings[:400] if len(text) < 120]
    assert check_strings(load_tokenizer(gguf_file), gguf_file, trained, texts) > 200


@pytest.mark.slow
@pytest.mark.clause("TK-SPM-1", "TK-SPM-2", "TK-SPM-3", "TK-GGUF-3")
def test_a_trained_vocabulary_on_three_thousand(gguf_file: Path, trained: Any, strings: list[str]) -> None:
    assert check_strings(load_tokenizer(gguf_file), gguf_file, trained, strings) > 1500


@pytest.mark.clause("TK-SPM-2")
def test_where_transformers_differs_from_sentencepiece(gguf_file: Path, trained: Any) -> None:
    """SentencePiece puts a space before every text; transformers' LlamaTokenizer not before one that has it."""
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = load_tokenizer(gguf_file)

    def spelt(ids: list[int]) -> str:
        return "".join(trained[0][i] for i in ids)

    assert spelt(theirs("  a", add_special_tokens=False)["input_ids"]) == SPACE * 2 + "a"
    assert spelt(ours.encode("  a", False)) == SPACE * 3 + "a"
    assert spelt(theirs("</s>a", add_special_tokens=False)["input_ids"]) == "</s>a"
    assert spelt(ours.encode("</s>a", False)) == f"</s>{SPACE}a"


@pytest.mark.clause("TK-GGUF-7")
def test_phi3_takes_the_space_behind_its_tokens() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", *BYTES, "a", SPACE, SPACE + "a"]
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL, *[BYTE] * 256, NORMAL, NORMAL, NORMAL]
    facts = metadata(tokens, [0.0] * len(tokens), types)
    named = {name: tokenizer_from_gguf({**facts, "general.name": name}) for name in ("Phi-3 Mini", "Llama 2")}
    spelt = {name: [tokens[i] for i in each.encode("<|end|>\n a<s> a", False)] for name, each in named.items()}
    assert spelt["Phi-3 Mini"] == ["<|end|>", SPACE + "a", "<s>", SPACE, SPACE + "a"]
    assert spelt["Llama 2"] == ["<|end|>", SPACE, "<0x0A>", SPACE + "a", "<s>", SPACE, SPACE + "a"]


@pytest.mark.clause("TK-GGUF-2", "TK-SPM-1")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores: got NoneType, expected an array of numbers"),
        ({"scores": [0.0]}, "scores: got 1 entries, expected one for each of 4 tokens"),
        ({"scores": [0.0, float("nan"), 0.0, 0.0]}, "scores: got nan, expected finite numbers"),
        (
            {"unknown_token_id": None, "token_type": [1, 3, 3, 1]},
            "got none for unknown text, expected an unknown token",
        ),
        ({"precompiled_charsmap": [1, 2, 3]}, "precompiled_charsmap: .* expected a character map"),
        ({"precompiled_charsmap": 7}, "precompiled_charsmap: got int, expected an array of bytes"),
        ({"add_space_prefix": 3}, "add_space_prefix: got 3, expected true or false"),
    ],
)
def test_broken_metadata(changes: dict[str, Any], message: str) -> None:
    facts = metadata(["<unk>", "<s>", "</s>", "a"], [0.0] * 4, [UNKNOWN, CONTROL, CONTROL, NORMAL], **changes)
    with pytest.raises(InvalidFormatError, match=message) as caught:
        tokenizer_from_gguf(facts)
    assert "\n" not in str(caught.value)


def charsmap() -> bytes:
    """A character map, made by hand, that turns a tab into a space and "Q" into "q".

    A double array of 32-bit units: the root's offset, xor the byte, is the place of the byte's unit, whose offset, xor
    that place, is the place of its value: where the replacement begins in the text behind the array.
    """
    units = [0] * 1024
    units[0] = 256 << 10
    for byte, value in ((9, 0), (ord("Q"), 2)):
        place = 256 ^ byte
        units[place] = byte | 1 << 8 | (place ^ (512 + byte)) << 10
        units[512 + byte] = value | 1 << 31
    array = struct.pack("<1024I", *units)
    return struct.pack("<I", len(array)) + array + b" \0q\0"


@pytest.mark.clause("TK-SPM-4", "TK-SPM-5")
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_the_character_map_comes_first(model: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "q", SPACE, SPACE + "q"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, NORMAL, NORMAL, NORMAL]
    scores = [0.0] * 259 + [-3.0, -2.0, -1.0]
    facts = metadata(tokens, scores, types, model=model, precompiled_charsmap=list(charsmap()))
    assert [tokens[i] for i in tokenizer_from_gguf(facts).encode("Q\tq", False)] == [SPACE + "q", SPACE + "q"]
    del facts["tokenizer.ggml.precompiled_charsmap"]
    assert tokens.index("q") not in tokenizer_from_gguf(facts).encode("Q", False)


@pytest.mark.clause("TK-SPM-5")
@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.parametrize("prefix", [True, False])
def test_spaces_that_are_taken_out(model: str, prefix: bool) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", SPACE]
    types = [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL]
    for removes in (True, False):
        facts = metadata(
            tokens, [0.0] * 5, types, model=model, add_space_prefix=prefix, remove_extra_whitespaces=removes
        )
        found = "".join(tokens[i] for i in tokenizer_from_gguf(facts).encode("  a   a ", False))
        inner = "a a" if removes else "  a   a "
        assert found == (" " * prefix + inner).replace(" ", SPACE)
        assert tokenizer_from_gguf(facts).encode("", False) == []


@pytest.mark.clause("TK-SPM-4")
def test_the_best_path_through_a_unigram_vocabulary() -> None:
    """The sum of the scores is what counts; an unknown character costs ten less than the worst piece."""
    tokens = ["<unk>", "<s>", "</s>", SPACE, "a", "b", "ab", SPACE + "a", "bb"]
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 6]
    scores = [0.0, 0.0, 0.0, -1.0, -2.0, -2.0, -2.5, -2.5, -3.9]
    ours = tokenizer_from_gguf(metadata(tokens, scores, types, model="t5", bos_token_id=None))
    assert [tokens[i] for i in ours.encode("abb", True)] == [SPACE, "ab", "b", "</s>"]
    assert [tokens[i] for i in ours.encode("axxb", False)] == [SPACE + "a", "<unk>", "b"]


def write_model(directory: Path, trained: Any, **changes: Any) -> Path:
    """tokenizer.model by protobuf's own writer."""
    message = proto.ModelProto()
    for text, score, kind in zip(*trained, strict=True):
        piece = message.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    message.trainer_spec.model_type = 2
    message.trainer_spec.byte_fallback = True
    message.trainer_spec.pad_id = -1
    message.normalizer_spec.remove_extra_whitespaces = False
    message.normalizer_spec.name = "identity"
    for path, value in changes.items():
        specification, field = path.split("__")
        setattr(getattr(message, specification), field, value)
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(message.SerializeToString())
    return directory


@pytest.mark.clause("TK-SPM-6", "TK-SPM-7", "TK-LOAD-1")
def test_a_models_own_file(trained: Any, tmp_path: Path, strings: list[str]) -> None:
    """The same ids as from GGUF with the same pieces; the roles are the file's own."""
    directory = write_model(tmp_path / "m", trained)
    reference = Reference(*trained)
    ours = load_tokenizer(directory)
    for text in (text for text in strings[:300] if len(text) < 100):
        assert ours.encode(text, True) == [1, *reference.encode(text)], ascii(text)
    special = ours.special_tokens()
    assert (special.unk_token, special.bos_token, special.eos_token, special.pad_token) == (0, 1, 2, None)
    (directory / "tokenizer_config.json").write_text(
        '{"add_bos_token": false, "add_eos_token": true, "pad_token": "a"}'
    )
    ours = load_tokenizer(directory)
    assert ours.encode("", True) == [2]
    assert ours.special_tokens().pad_token == ours.token_id("a")
    without = load_tokenizer(write_model(tmp_path / "n", trained, normalizer_spec__add_dummy_prefix=False))
    assert without.encode("Qx", False) == Reference(*trained, prefix=False).encode("Qx")


@pytest.mark.clause("TK-SPM-6")
def test_user_defined_and_unused_pieces(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", SPACE * 3, *BYTES, SPACE, "a", "b", "ab"]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, *[BYTE] * 256, NORMAL, NORMAL, NORMAL, UNUSED]
    directory = write_model(tmp_path, (tokens, [0.0] * len(tokens), types), normalizer_spec__add_dummy_prefix=False)
    ours = load_tokenizer(directory)
    assert [tokens[i] for i in ours.encode("a    ab", False)] == ["a", SPACE * 3, SPACE, "a", "b"]
    assert ours.decode(ours.encode("a    ab", False), True) == "a    ab"


@pytest.mark.clause("TK-SPM-6", "TK-SPM-7", "TK-DIR-1")
def test_model_files_that_are_refused(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"Unigram model without tokenizer\.json"):
        load_tokenizer(write_model(tmp_path, trained, trainer_spec__model_type=1))
    assert read_sentencepiece_model(tmp_path / "tokenizer.model").is_unigram
    with pytest.raises(UnsupportedError, match=r"model_type: got 3, expected 1 \(Unigram\) or 2 \(BPE\)"):
        load_tokenizer(write_model(tmp_path, trained, trainer_spec__model_type=3))
    path = tmp_path / "tokenizer.model"
    good = path.read_bytes()
    for bad in (
        b"",
        b"\x00",
        b"{}",
        good[:-1],
        good[:1000],
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x0b",
    ):
        path.write_bytes(bad)
        with pytest.raises(InvalidFormatError, match="expected a SentencePiece model"):
            load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(NotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError, match=r"tokenizer\.model: no such file"):
        read_sentencepiece_model(path)


@pytest.mark.clause("TK-SPM-6")
def test_damaged_model_files(trained: Any, tmp_path: Path) -> None:
    """Whatever the damage: a tokenizer, or one clear error."""
    small = tuple(part[:300] for part in trained)
    path = write_model(tmp_path, small) / "tokenizer.model"
    good, rng = path.read_bytes(), random.Random(5)
    for _ in range(150):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("hello wörld", True), True)
        except FerrumError as error:
            message = str(error)
        else:
            message = ""
        assert "\n" not in message
