"""Small tokenizers whose every id can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ferrum_ref.tokenizer import HuggingFaceTokenizer

SPECIAL = ("<bos>", "<eos>", "<pad>")


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0 to 255, in order of the bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def byte_level() -> Tokenizer:
    """Ids 0 to 255 are the bytes; then "he", "hello", three special tokens and an added one."""
    alphabet = byte_alphabet()
    vocabulary = {text: byte for byte, text in enumerate(alphabet)}
    for text in ("he", "ll", "hell", "hello"):
        vocabulary[text] = len(vocabulary)
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def byte_fallback() -> Tokenizer:
    """Sentencepiece style: pieces with a leading space, and 256 byte tokens for what has no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocabulary = {text: token_id for token_id, text in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.fixture
def byte_backend() -> Tokenizer:
    """A fresh byte-level backend: a test may change it."""
    return byte_level()


@pytest.fixture(scope="session")
def raw_bytes() -> HuggingFaceTokenizer:
    """Ids 0 to 255 are the bytes, 256 is a special token."""
    backend = Tokenizer(models.BPE(vocab={text: byte for byte, text in enumerate(byte_alphabet())}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return HuggingFaceTokenizer(backend)


@pytest.fixture(scope="session")
def fallback_bytes() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(byte_fallback())


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    """A directory with tokenizer.json and nothing else."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path
