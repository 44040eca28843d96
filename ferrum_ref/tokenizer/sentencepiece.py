"""SentencePiece vocabularies as `tokenizers` pipelines: BPE by score, and Unigram.  [TK-SPM-1..5]

SentencePiece's BPE joins, again and again, the two neighbours whose union is the piece of highest score, the leftmost
of equals.  A piece of rank r among the scores can come from any of its splits into two pieces, so those splits, in the
order of the scores, are the merge list of an ordinary BPE.
Source: sentencepiece, bpe_model.cc, unigram_model.cc and normalizer.cc; llama.cpp, llm_tokenizer_spm and _ugm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.tokenizer.gguf_metadata import NORMAL, USER_DEFINED

_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
_JOINABLE: Final = frozenset({NORMAL, USER_DEFINED})


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary: texts by id, their scores and types, and the piece for what has none."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown: int | None
    source: str


@dataclass(frozen=True, slots=True)
class Normalization:
    """What happens to a text before it is cut into pieces."""

    charsmap: bytes = b""
    adds_space_prefix: bool = True
    removes_extra_spaces: bool = False


def by_score(pieces: Pieces, normalization: Normalization) -> Tokenizer:
    """The pipeline of a BPE vocabulary.  Pure.  Raises InvalidFormatError."""
    _check_unknown(pieces)
    vocabulary = {text: token_id for token_id, text in enumerate(pieces.texts)}
    unknown = None if pieces.unknown is None else pieces.texts[pieces.unknown]
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges_by_score(pieces, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # noqa: BLE001  the library raises bare Exceptions
        raise _refusal(pieces, error) from None
    backend = Tokenizer(model)
    backend.normalizer = _normalizer(pieces, normalization)
    backend.decoder = _decoder(normalization)
    return backend


def unigram(pieces: Pieces, normalization: Normalization, byte_fallback: bool) -> Tokenizer:
    """The pipeline of a Unigram vocabulary.  Pure.  Raises InvalidFormatError."""
    if not byte_fallback:
        _check_unknown(pieces, "an unknown token")
    try:
        model = models.Unigram(
            vocab=list(zip(pieces.texts, pieces.scores, strict=True)),
            unk_id=pieces.unknown,
            byte_fallback=byte_fallback,
        )
    except Exception as error:  # noqa: BLE001  the library raises bare Exceptions
        raise _refusal(pieces, error) from None
    backend = Tokenizer(model)
    if normalization.removes_extra_spaces and normalization.adds_space_prefix:
        if normalization.charsmap:
            backend.normalizer = _charsmap(pieces, normalization)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, "always", split=True)]
        )
    else:
        backend.normalizer = _normalizer(pieces, normalization)
    backend.decoder = _decoder(normalization)
    return backend


def merges_by_score(pieces: Pieces, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which SentencePiece would join them.  Pure.

    Pieces of equal score come in the order of their ids, and a piece's splits from left to right.
    """
    joinable = [token_id for token_id, kind in enumerate(pieces.types) if kind in _JOINABLE]
    parts = {pieces.texts[token_id] for token_id in joinable}
    merges = []
    for token_id in sorted(joinable, key=lambda each: (-pieces.scores[each], each)):
        text = pieces.texts[token_id]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in parts and right in parts:
                merges.append((left, right))
    return merges


def _check_unknown(pieces: Pieces, expected: str = "an unknown token or all 256 byte tokens") -> None:
    """Something must stand for a character that has no piece."""
    complete = frozenset(f"<0x{byte:02X}>" for byte in range(256)) <= frozenset(pieces.texts)
    if pieces.unknown is None and not complete:
        raise InvalidFormatError(f"read {pieces.source}: vocabulary: got none for unknown text, expected {expected}")


def _normalizer(pieces: Pieces, normalization: Normalization) -> normalizers.Normalizer:
    """The character map, spaces taken out, one put in front, and all of them made visible."""
    steps: list[normalizers.Normalizer] = [_charsmap(pieces, normalization)] if normalization.charsmap else []
    if normalization.removes_extra_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if normalization.adds_space_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _charsmap(pieces: Pieces, normalization: Normalization) -> normalizers.Normalizer:
    try:
        return normalizers.Precompiled(normalization.charsmap)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  a panic of the library is no Exception
        raise InvalidFormatError(
            f"read {pieces.source}: precompiled_charsmap: {' '.join(str(error).split()):.120}; expected a character map"
        ) from None


def _decoder(normalization: Normalization) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalization.adds_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _refusal(pieces: Pieces, error: Exception) -> InvalidFormatError:
    return InvalidFormatError(f"read {pieces.source}: vocabulary: {' '.join(str(error).split()):.160}")
