"""SentencePiece's own model files, tokenizer.model, without its library.  [TK-SPM-6, TK-SPM-7]

    ModelProto       1 pieces, 2 trainer_spec, 3 normalizer_spec
    SentencePiece    1 piece, 2 score, 3 type
    TrainerSpec      3 model_type, 35 byte_fallback, 40..43 the ids of unk, bos, eos and pad
    NormalizerSpec   2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces

Source: sentencepiece_model.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.tokenizer.gguf_metadata import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from ferrum_ref.tokenizer.protobuf import Value, fields, signed
from ferrum_ref.tokenizer.sentencepiece import Normalization, Pieces, by_score, unigram

_UNIGRAM: Final = 1
_BPE: Final = 2
_ROLE_FIELDS: Final = (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, -1))
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A model file: its pipeline with its added tokens, and the texts of the tokens with roles."""

    backend: Tokenizer
    roles: Mapping[str, str]
    is_unigram: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """The model in a file.  [TK-SPM-6]

    Raises NotFoundError, FerrumIOError, InvalidFormatError (not such a file, or one that contradicts itself),
    UnsupportedError (neither BPE nor Unigram).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"open tokenizer {path}: no such file") from None
    except OSError as error:
        raise FerrumIOError(f"open tokenizer {path}: {error.strerror or error}") from error
    try:
        return _model(data, str(path))
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise InvalidFormatError(f"read {path}: {error!s:.160}; expected a SentencePiece model") from None


def _model(data: bytes, source: str) -> SentencePieceModel:
    entries: list[tuple[str, float, int]] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in fields(data):
        if number == 1:
            entries.append(_piece(_raw(value)))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(fields(_raw(value)))
    if not entries:
        raise ValueError("got no pieces")
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise UnsupportedError(f"read {source}: model_type: got {kind!a:.20}, expected 1 (Unigram) or 2 (BPE)")
    pieces = _pieces(entries, source)
    normalization = Normalization(
        charsmap=_raw(normalizer.get(2, b"")),
        adds_space_prefix=normalizer.get(3, 1) != 0,
        removes_extra_spaces=normalizer.get(4, 1) != 0,
    )
    if kind == _UNIGRAM:
        backend = unigram(pieces, normalization, byte_fallback=trainer.get(35, 0) != 0)
    else:
        backend = by_score(pieces, normalization)
    backend.add_tokens(
        [
            AddedToken(text, special=kind != USER_DEFINED, normalized=False)
            for text, kind in zip(pieces.texts, pieces.types, strict=True)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )
    return SentencePieceModel(backend, _roles(pieces, trainer), is_unigram=kind == _UNIGRAM)


def _raw(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"got {value!a:.40}, expected bytes")
    return value


def _piece(data: bytes) -> tuple[str, float, int]:
    found = dict(fields(data))
    return _raw(found.get(1, b"")).decode("utf-8"), float(found.get(2, 0.0)), int(found.get(3, NORMAL))


def _pieces(entries: list[tuple[str, float, int]], source: str) -> Pieces:
    """User-defined pieces are looked for in the text as it is, so theirs are real spaces."""
    texts = [text.replace(_SPACE, " ") if kind == USER_DEFINED else text for text, _, kind in entries]
    if len(set(texts)) != len(texts):
        raise ValueError("got a piece twice")
    types = [kind for _, _, kind in entries]
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    return Pieces(texts, [score for _, score, _ in entries], types, unknown, source)


def _roles(pieces: Pieces, trainer: Mapping[int, Value]) -> dict[str, str]:
    """A piece has the role whose id is its own, unless it is an ordinary one."""
    roles = {}
    for role, number, default in _ROLE_FIELDS:
        token_id = signed(int(trainer.get(number, default)))
        if 0 <= token_id < len(pieces.texts) and pieces.types[token_id] != NORMAL:
            roles[role] = pieces.texts[token_id]
    return roles
