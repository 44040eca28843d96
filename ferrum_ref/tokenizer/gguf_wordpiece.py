"""WordPiece from GGUF metadata: `tokenizer.ggml.model` "bert".  [TK-GGUF-8]

Converters write a word's first piece with U+2581 in front and its further pieces bare; BERT's own vocabulary writes
them bare and with "##".  Source: llama.cpp, convert_hf_to_gguf.py (BertModel) and llm_tokenizer_wpm.
"""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.tokenizer.gguf_metadata import GgufVocabulary

_WORD: Final = "\N{LOWER ONE EIGHTH BLOCK}"
_CONTINUES: Final = "##"


def wordpiece(vocabulary: GgufVocabulary) -> Tokenizer:
    """The pipeline without its added tokens; texts are lower-cased unless the file says otherwise.  Pure.

    Raises InvalidFormatError on a vocabulary without an unknown token, or with two tokens that mean the same.
    """
    unknown = vocabulary.roles.get("unk_token")
    if unknown is None:
        vocabulary.fail("unknown_token_id", "none", "the id of the token for unknown words")
    spellings = respelled(vocabulary)
    texts = {text: token_id for token_id, text in enumerate(spellings)}
    if len(texts) != len(spellings):
        raise InvalidFormatError(f"read {vocabulary.source}: tokenizer.ggml.tokens: got two tokens of one meaning")
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    backend = Tokenizer(
        models.WordPiece(vocab=texts, unk_token=spellings[unknown], continuing_subword_prefix=_CONTINUES)
    )
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=vocabulary.flag("normalizer.strip_accents", lowercase)
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(_CONTINUES)
    return backend


def respelled(vocabulary: GgufVocabulary) -> list[str]:
    """The tokens as BERT's vocabulary spells them.  Pure."""
    return [_respelled(text) for text in vocabulary.tokens]


def _respelled(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):  # "[CLS]" is left as it is
        return text
    return text.removeprefix(_WORD) if text.startswith(_WORD) else _CONTINUES + text
