"""`load_tokenizer`: the tokenizer that belongs to a model's files.  Clause: TK-LOAD-1 (specs/tokenizer.md)."""

from __future__ import annotations

from pathlib import Path

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, NotFoundError
from ferrum_ref.formats.gguf import GgufFile
from ferrum_ref.tokenizer.from_directory import tokenizer_from_directory
from ferrum_ref.tokenizer.from_gguf import tokenizer_from_gguf
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer


def load_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a GGUF file, a Hugging Face directory, or a directory that holds one GGUF file.  [TK-LOAD-1]

    Raises NotFoundError (nothing there), InvalidFormatError (a broken file), UnsupportedError (an algorithm that is
    not offered), FerrumIOError.
    """
    path = Path(path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "tokenizer.json").exists() or not ggufs:
            return tokenizer_from_directory(path)
        if len(ggufs) > 1:
            raise InvalidParameterError(f"open tokenizer {path}: got {len(ggufs)} GGUF files, expected one; name it")
        path = ggufs[0]
    elif not path.exists():
        raise NotFoundError(f"open tokenizer {path}: no such file or directory")
    with GgufFile(path) as file:
        embedding = file.tensors.get("token_embd.weight")
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if embedding is not None and isinstance(tokens, tuple) and len(tokens) > embedding.shape[0]:
            raise InvalidFormatError(
                f"read GGUF {path}: tokenizer.ggml.tokens: got {len(tokens)} tokens, "
                f"expected at most the {embedding.shape[0]} rows of token_embd.weight"
            )
        return tokenizer_from_gguf(file.metadata, f"GGUF {path}")
