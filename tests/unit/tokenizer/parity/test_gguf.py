"""Vocabularies written to GGUF files with the gguf package, read here and by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer
from ferrum_ref.tokenizer.byte_level import PRE_KINDS

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PLAIN = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais")
THEIRS = tuple(name for name in PRE_KINDS if name in GGUF_PRE_TOKENIZER_SPLITS)
# DeepSeek LLM's letters
CASED = r"[\p{Lu}\p{Ll}\p{Lt}--[\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\uab68]]"
LLAMA_CPP = {  # the expressions of llama-vocab.cpp, one split after another
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"],
    "deepseek-llm": [
        "[\r\n]",
        rf"(?V1)\s?{CASED}+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "glm4": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "bloom": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"],
    "viking": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"],
}


def write(directory: Path, model: str, tokens: Sequence[str], types: Iterable[int], **more: Any) -> Path:
    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(path, more.pop("architecture", "llama"))
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(backend: Tokenizer) -> tuple[list[str], list[int], list[str]]:
    """Tokens by id; 3 for the special ones, 4 for other added ones, else 1; merges."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda text: vocabulary[text])
    added = backend.get_added_tokens_decoder()
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    merges = json.loads(backend.to_str())["model"].get("merges", [])
    return tokens, types, [" ".join(merge) for merge in merges]


@pytest.fixture(scope="module")
def byte_level_file(
    directory_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    @cache
    def make(pre: str) -> Path:
        backend = Tokenizer.from_file(str(directory_of("byte-level") / "tokenizer.json"))
        tokens, types, merges = contents(backend)
        directory = tmp_path_factory.mktemp(pre)
        ids = {name: tokens.index(text) for name, text in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"))}
        return write(
            directory, "gpt2", tokens, types, token_merges=merges, tokenizer_pre=pre, **ids, add_bos_token=True
        )

    return make


def assert_ids(ours: HuggingFaceTokenizer, theirs: Any, texts: list[str], add_special: bool) -> None:
    expected = theirs(texts, add_special_tokens=add_special)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text, add_special) == ids, ascii(text)
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.clause("TK-GGUF-1", "TK-GGUF-5", "TK-GGUF-3")
@pytest.mark.parametrize("pre", [*PLAIN[:2], "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
def test_kinds_that_transformers_reads(pre: str, byte_level_file: Callable[[str], Path], strings: list[str]) -> None:
    path = byte_level_file(pre)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.model.ignore_merges = PRE_KINDS[pre].whole_words  # as the models' own files have it
    ours = load_tokenizer(path)
    assert_ids(ours, theirs, strings[:250], add_special=True)
    assert (ours.special_tokens().bos_token, ours.special_tokens().eos_token) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
    )


@pytest.mark.slow
@pytest.mark.clause("TK-GGUF-1", "TK-GGUF-5", "TK-GGUF-3")
@pytest.mark.parametrize("pre", [*PLAIN, *THEIRS])
def test_three_thousand_of_each(pre: str, byte_level_file: Callable[[str], Path], strings: list[str]) -> None:
    path = byte_level_file(pre)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.model.ignore_merges = PRE_KINDS[pre].whole_words
    assert_ids(load_tokenizer(path), theirs, strings, add_special=True)


@pytest.mark.clause("TK-GGUF-5")
def test_every_kind_splits_somehow_and_loses_nothing(
    byte_level_file: Callable[[str], Path], strings: list[str]
) -> None:
    for pre in PRE_KINDS:
        splitter = PRE_KINDS[pre].pre_tokenizer()
        for text in strings[60:100]:
            pieces = splitter.pre_tokenize_str(text)
            ends = [0, *(end for _, (_, end) in pieces)]
            assert ends[-1] == len(text)
            assert [start for _, (start, _) in pieces] == ends[:-1], (pre, text)


@pytest.mark.clause("TK-GGUF-5")
@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_kinds_as_llama_cpp_splits(pre: str, strings: list[str]) -> None:
    """Python's `regex` with llama.cpp's expressions, on letters that both libraries know."""
    splitter = PRE_KINDS[pre].pre_tokenizer()
    for text in strings[:600]:
        pieces = [text] if text else []
        for expression in LLAMA_CPP[pre]:
            pieces = [part for piece in pieces for part in isolated(expression, piece)]
        found = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        if all(map(settled, text)):
            assert found == pieces, ascii(text)


def settled(character: str) -> bool:
    """Known to every Unicode version in use, so that the two libraries agree on its category."""
    return ord(character) < 0x3000 or 0x3040 <= ord(character) <= 0x9FA5 or 0xAC00 <= ord(character) <= 0xD7A3


def isolated(expression: str, text: str) -> list[str]:
    parts, end = [], 0
    for match in regex.finditer(expression, text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in (*parts, text[end:]) if part]


@pytest.mark.clause("TK-GGUF-8")
def test_wordpiece(directory_of: Callable[[str], Path], tmp_path: Path, strings: list[str]) -> None:
    """Written as converters write BERT: U+2581 in front of words, "##" left out, "[...]" as it is."""
    original = load_tokenizer(directory_of("wordpiece"))
    tokens = [str(original.token_text(token_id)) for token_id in range(original.vocab_size())]
    types = [3 if original.is_special_token(token_id) else 1 for token_id in range(len(tokens))]
    phantom = [
        text if text[:1] == "[" and text[-1:] == "]" else text[2:] if text.startswith("##") else f"\u2581{text}"
        for text in tokens
    ]
    ids = {f"{role}_token_id": tokens.index(f"[{role.upper()}]") for role in ("sep", "unk", "pad", "mask")}
    path = write(tmp_path, "bert", phantom, types, architecture="bert", bos_token_id=tokens.index("[CLS]"), **ids)
    ours = load_tokenizer(path)
    for text in strings[:300]:
        for add_special in (True, False):
            assert ours.encode(text, add_special) == original.encode(text, add_special), ascii(text)
        assert ours.decode(ours.encode(text, True), True) is not None
    assert ours.special_tokens().mask_token == ids["mask_token_id"]
    assert ours.token_text(1000) == tokens[1000]


@pytest.mark.clause("TK-SPM-4")
def test_unigram(directory_of: Callable[[str], Path], tmp_path: Path, strings: list[str]) -> None:
    """As transformers reads T5 files, the sentinels apart that it adds behind the vocabulary."""
    entries = json.loads((directory_of("unigram") / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    named = {"<pad>": ["<pad>", 0.0], "</s>": ["</s>", 0.0], "<unk>": ["<unk>", 0.0]}
    pieces = [*named.values(), *(entry for entry in entries if entry[0] not in named and entry[0] != "<s>")]
    types = [3, 3, 2, *[1] * (len(pieces) - 3)]
    path = write(
        tmp_path,
        "t5",
        [text for text, _ in pieces],
        types,
        architecture="t5",
        token_scores=[score for _, score in pieces],
        pad_token_id=0,
        eos_token_id=1,
        unk_token_id=2,
    )
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(path)
    texts = [text for text in strings[:600] if "<extra_id_" not in text]
    assert len(texts) > 400
    expected = theirs(texts)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text, True) == ids, ascii(text)
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.model
@pytest.mark.clause("TK-GGUF-1", "TK-GGUF-5")
def test_smollm2_is_its_own_pipeline(smollm2_path: Path, strings: list[str]) -> None:
    """The pieces that its tokenizer.json names: single digits, then GPT-2's split."""
    from ferrum_ref.formats.gguf import GgufFile

    with GgufFile(smollm2_path) as file:
        tokens: Any = file.metadata["tokenizer.ggml.tokens"]
        merges: Any = file.metadata["tokenizer.ggml.merges"]
        types: Any = file.metadata["tokenizer.ggml.token_type"]
    backend = Tokenizer(
        models.BPE({text: i for i, text in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([text for text, kind in zip(tokens, types, strict=True) if kind == 3])
    ours = load_tokenizer(smollm2_path)
    for text, expected in zip(strings, backend.encode_batch(strings), strict=True):
        assert ours.encode(text, False) == expected.ids, ascii(text)
        assert ours.decode(expected.ids, True) == backend.decode(expected.ids)
