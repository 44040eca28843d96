"""SentencePiece tokenizers from GGUF metadata: `tokenizer.ggml.model` "llama" (BPE by score) and "t5" (Unigram)."""

from __future__ import annotations

from tokenizers import Tokenizer

from ferrum_ref.tokenizer.gguf_metadata import BYTE, UNKNOWN, GgufVocabulary
from ferrum_ref.tokenizer.sentencepiece import Normalization, Pieces, by_score, unigram


def sentencepiece_bpe(vocabulary: GgufVocabulary) -> Tokenizer:
    """The pipeline of "llama", without its added tokens.  Pure.  Raises InvalidFormatError.  [TK-SPM-1..3]"""
    return by_score(_pieces(vocabulary), _normalization(vocabulary, removes_extra_spaces=False))


def sentencepiece_unigram(vocabulary: GgufVocabulary) -> Tokenizer:
    """The pipeline of "t5", without its added tokens.  Pure.  Raises InvalidFormatError.  [TK-SPM-4]"""
    normalization = _normalization(vocabulary, removes_extra_spaces=True)
    return unigram(_pieces(vocabulary), normalization, byte_fallback=bool(vocabulary.of_type([BYTE])))


def _pieces(vocabulary: GgufVocabulary) -> Pieces:
    unknown = vocabulary.roles.get("unk_token")
    if unknown is None:
        unknown = next(iter(vocabulary.of_type([UNKNOWN])), None)
    return Pieces(vocabulary.tokens, vocabulary.scores(), vocabulary.types, unknown, vocabulary.source)


def _normalization(vocabulary: GgufVocabulary, removes_extra_spaces: bool) -> Normalization:
    charsmap = vocabulary.data("precompiled_charsmap")
    return Normalization(
        charsmap=charsmap,
        adds_space_prefix=vocabulary.flag("add_space_prefix", True),
        removes_extra_spaces=vocabulary.flag("remove_extra_whitespaces", removes_extra_spaces),
    )
