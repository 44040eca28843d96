"""Tokenizers of every kind, trained on text that every Python has, and texts and chats that are hard on them."""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
MARKS = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]
FOREIGN = (
    "Grüße aus Köln, ça va? наша речь и мир. 世界你好，今天天气很好。こんにちは世界。안녕하세요 세계. שלום עולם. "
    "مرحبا بالعالم. हिन्दी में नमस्ते। สวัสดีชาวโลก. Ελληνικά κείμενα. Zażółć gęślą jaźń. "
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def lines() -> list[str]:
    """Python's own help texts, and a few sentences of other scripts."""
    return [*"\n".join(pydoc_data.topics.topics.values())[:250_000].splitlines(keepends=True), *[FOREIGN] * 20]


def byte_level(split: str | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*ROLES.values(), *MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(lines(), trainer)
    return backend


def gpt2_style() -> PreTrainedTokenizerBase:
    backend = byte_level()
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("tool", lstrip=True, single_word=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def llama3_style() -> PreTrainedTokenizerBase:
    backend = byte_level(LLAMA3_SPLIT)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def byte_fallback() -> PreTrainedTokenizerBase:
    """Llama-2's kind: pieces with their spaces, and 256 byte tokens for what has no piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, limit_alphabet=90, show_progress=False)
    backend.train_from_iterator(lines(), trainer)
    vocabulary = backend.get_vocab()
    merges = _merges(backend)
    return LlamaTokenizerFast(vocab=vocabulary, merges=merges, pad_token="<unk>", add_bos_token=True)


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def unigram() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    backend.decoder = decoders.Metaspace("▁", "always", split=True)
    special = list(ROLES.values())
    trainer = trainers.UnigramTrainer(
        vocab_size=1200, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    backend.train_from_iterator(lines()[::4], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens([AddedToken("<extra_id_0>", lstrip=True, rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def wordpiece() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=list(BERT.values()), show_progress=False)
    backend.train_from_iterator(lines(), trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True, **BERT)


def word_level() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=1500, special_tokens=list(ROLES.values()), show_progress=False)
    backend.train_from_iterator(lines(), trainer)
    backend.add_tokens([AddedToken("Read Me", normalized=True), AddedToken("VERBATIM", normalized=False, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True, **ROLES)


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": gpt2_style,
    "byte-level-split": llama3_style,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "word-level": word_level,
}


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a kind's tokenizer, as transformers saves it; trained on first use."""

    @cache
    def make(kind: str) -> Path:
        directory = tmp_path_factory.mktemp("trained") / kind
        KINDS[kind]().save_pretrained(directory)
        return directory

    return make


HARD = (
    *(
        "",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n\n",
        "\u00a0",
        "\u3000",
        " \n \t ",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x07\x7f",
    ),
    *("a", " a", "a ", "  a  b  ", "it's I'LL we'Re don't", "1234567890 12,345.67", "x\ty\r\nz", "https://a.b/c?d=e#f"),
    *(
        "e\u0301 \u00e9 \u1e9b\u0323",
        "ﬁ ﬂ Ⅷ ² ½ ①",
        "ß ẞ İ ı ſ K",
        "\u202eabc\u202c",
        "a\u0300\u0316\u0301",
        "\u0e33 \u0eb3",
    ),
    *(
        "👍🏽",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "🙂🙃" * 3,
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
        "\U0010ffff\U000e0001",
        "\ufffd",
        "\ufffd\ufffda",
        "\ufdfa",
        "\U0001d15e",
    ),
    *(
        "<s>",
        "</s><s>",
        "a<s>b",
        " <s> ",
        "<s",
        "<unk>",
        "<pad> x",
        "<|im_start|>user\nhi<|im_end|>\n",
        "[INST] x [/INST]",
    ),
    *(
        "[CLS] a [MASK] b [SEP]",
        "[UNK]",
        "<extra_id_0>",
        " <extra_id_0> x",
        "<think>x</think>",
        "a tool, tools tool",
        "<0x41>",
    ),
    *(
        "▁",
        "▁a",
        "a▁b",
        "##ing",
        "ing",
        "Ġa",
        "read me READ ME verbatim VERBATIM  x",
        "x" * 300,
        "ab " * 100,
        " ." * 20,
    ),
    *(
        "do n't ' s . , ! ? 'm 've 're ' '",
        "it ' s n ' t",
        "安 全",
        "한국어 조합형 \u1112\u1161\u11ab",
        "नमस्ते\u0964",
        "ﷺ",
    ),
)


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """3,000 texts: the hard ones, pieces of help text, random Unicode, and mixtures of all of them."""
    rng = random.Random(20_240_726)
    text = "".join(lines())
    made = list(HARD)
    while len(made) < 3000:
        kind = rng.randrange(4)
        if kind == 0:
            place = rng.randrange(len(text) - 200)
            made.append(text[place : place + rng.randrange(1, 200)])
        elif kind == 1:
            made.append("".join(_character(rng) for _ in range(rng.randrange(1, 40))))
        elif kind == 2:
            made.append(rng.choice(["", " ", "\n"]).join(rng.choice(HARD) for _ in range(rng.randrange(2, 6))))
        else:
            words = [*rng.sample(FOREIGN.split(), 3), *rng.sample(MARKS, 2), *rng.sample([*ROLES.values()], 2)]
            rng.shuffle(words)
            made.append(rng.choice(["", " ", "  ", "\n"]).join(words))
    return made


def _character(rng: random.Random) -> str:
    ranges = ((0x20, 0x7E), (0, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x400, 0x6FF), (0x900, 0xE7F), (0x2000, 0x2BFF))
    more = ((0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1D400, 0x1FAFF), (0, 0x10FFFF))
    while True:
        low, high = rng.choice(ranges + more)
        code = rng.randint(low, high)
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)
