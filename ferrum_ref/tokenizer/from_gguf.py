"""A tokenizer rebuilt from a GGUF file's metadata.

    tokenizer.ggml.model   "gpt2" byte-level BPE, "llama" SentencePiece BPE, "t5" Unigram, "bert" WordPiece
    tokenizer.ggml.{pre, tokens, token_type, scores, merges, ...}, *_token_id, add_bos_token, add_eos_token
    tokenizer.chat_template, tokenizer.chat_template.<name>

Clauses: TK-GGUF-1..8, TK-SPM-1..5 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.tokenizer.around_text import put_around
from ferrum_ref.tokenizer.byte_level import byte_level
from ferrum_ref.tokenizer.chat_template import ChatTemplate
from ferrum_ref.tokenizer.gguf_metadata import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, GgufVocabulary
from ferrum_ref.tokenizer.gguf_sentencepiece import sentencepiece_bpe, sentencepiece_unigram
from ferrum_ref.tokenizer.gguf_wordpiece import respelled, wordpiece
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import SpecialTokens

_TEMPLATE: Final = "tokenizer.chat_template"
_NOT_STRIPPED: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True, slots=True)
class _Built:
    """A pipeline, and what stands around a text where the file does not say."""

    backend: Tokenizer
    adds_bos: bool
    adds_eos: bool


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str = "GGUF") -> HuggingFaceTokenizer:
    """The tokenizer that the metadata describe.  [TK-GGUF-1..8]

    Pure.  Raises UnsupportedError (another algorithm or pre-tokenizer, by its name), InvalidFormatError (missing,
    contradictory or malformed entries).
    """
    model = metadata.get("tokenizer.ggml.model")
    if isinstance(model, str) and model not in _MODELS:
        raise UnsupportedError(
            f"read {source}: tokenizer.ggml.model: got {model!r:.60}, expected one of {', '.join(_MODELS)}"
        )
    vocabulary = GgufVocabulary(metadata, source)
    built = _MODELS[vocabulary.text("model")](vocabulary)
    backend = built.backend
    backend.add_tokens(_added_tokens(vocabulary))
    ids = vocabulary.roles
    _add_special_around(vocabulary, built)
    named = _templates(metadata, {role: str(backend.id_to_token(token_id)) for role, token_id in ids.items()})
    name = metadata.get("general.name")
    return HuggingFaceTokenizer(
        backend,
        special_tokens=SpecialTokens(**{role: TokenId(token_id) for role, token_id in ids.items()}),
        stop_token_ids=vocabulary.end_ids(),
        chat_template=named.pop("default", None),
        named_chat_templates=named,
        model_name=name if isinstance(name, str) else None,
    )


def _byte_level(vocabulary: GgufVocabulary) -> _Built:
    backend, kind = byte_level(vocabulary)
    return _Built(backend, adds_bos=kind.begins_with_bos, adds_eos=False)


_MODELS: Final[Mapping[str, Callable[[GgufVocabulary], _Built]]] = MappingProxyType(
    {
        "gpt2": _byte_level,
        "llama": lambda vocabulary: _Built(sentencepiece_bpe(vocabulary), adds_bos=True, adds_eos=False),
        "t5": lambda vocabulary: _Built(sentencepiece_unigram(vocabulary), adds_bos=False, adds_eos=True),
        "bert": lambda vocabulary: _Built(wordpiece(vocabulary), adds_bos=True, adds_eos=True),
    }
)


def _added_tokens(vocabulary: GgufVocabulary) -> list[AddedToken]:
    """Tokens that are found in a text before anything else; control and unknown tokens are special, as are roles.

    A role that the file types as an ordinary token ("!" for unknown text) stays one.
    """
    untyped = vocabulary.get("token_type") is None
    roles = {token_id for token_id in vocabulary.roles.values() if untyped or vocabulary.types[token_id] != NORMAL}
    special = {*vocabulary.of_type([CONTROL, UNKNOWN]), *roles}
    spellings = respelled(vocabulary) if vocabulary.get("model") == "bert" else vocabulary.tokens
    strips = _strips_behind(vocabulary)
    return [
        AddedToken(
            spellings[token_id],
            special=token_id in special,
            normalized=False,
            rstrip=strips and spellings[token_id] not in _NOT_STRIPPED,
        )
        for token_id in sorted(special | set(vocabulary.of_type([USER_DEFINED])))
    ]


def _strips_behind(vocabulary: GgufVocabulary) -> bool:
    """Phi-3's added tokens take the white space behind them; no entry says so but the model's name.  [TK-GGUF-7]"""
    name = vocabulary.metadata.get("general.name")
    return isinstance(name, str) and any(spelling in name.lower() for spelling in ("phi-3", "phi3"))


def _add_special_around(vocabulary: GgufVocabulary, built: _Built) -> None:
    """BOS before and EOS behind every text, where the file asks for them.  Mutates the backend.  [TK-GGUF-3]"""
    ids, backend = vocabulary.roles, built.backend
    begin, end = ids.get("bos_token"), ids.get("eos_token")
    if vocabulary.get("model") == "bert":  # its own names for what stands around a text
        begin, end = ids.get("cls_token", begin), ids.get("sep_token", end)
    begin = begin if vocabulary.flag("add_bos_token", built.adds_bos) else None
    end = end if vocabulary.flag("add_eos_token", built.adds_eos) else None
    try:
        put_around(backend, *(None if token is None else backend.id_to_token(token) for token in (begin, end)))
    except ValueError as error:
        vocabulary.fail("add_bos_token", f"a special token that cannot stand around a text ({error})", "a plain token")


def _templates(metadata: Mapping[str, Any], special_tokens: Mapping[str, str]) -> dict[str, ChatTemplate]:
    """Templates by name; the plain entry is the default."""
    texts = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": text
        for key, text in metadata.items()
        if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and isinstance(text, str) and text
    }
    return {name: ChatTemplate(text, special_tokens) for name, text in texts.items()}
