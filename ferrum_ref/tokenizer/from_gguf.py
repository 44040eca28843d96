"""A tokenizer rebuilt from a GGUF file's metadata: byte-level BPE of the families that are known to be rebuilt exactly.

    tokenizer.ggml.model "gpt2", .pre, .tokens, .token_type, .merges, .bos_token_id ..., tokenizer.chat_template

Clauses: TK-GGUF-1..4 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.tokenizer.chat_template import ChatTemplate
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import SpecialTokens

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_UNSET: Final = 2**32 - 1
_ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
        "sep_token": "seperator_token_id",  # the specification's own spelling
        "cls_token": "cls_token_id",
        "mask_token": "mask_token_id",
    }
)
_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str = "GGUF") -> HuggingFaceTokenizer:
    """The tokenizer that the metadata describe; llama.cpp and transformers agree with it id for id.  [TK-GGUF-1..4]

    Pure.  Raises UnsupportedError (another algorithm or pre-tokenizer, by its name), InvalidFormatError (missing,
    contradictory or malformed entries).
    """
    reader = _Reader(metadata, source)
    model = reader.text("model")
    if model != "gpt2":
        raise UnsupportedError(f"read {source}: tokenizer.ggml.model: got {model!r:.60}, expected 'gpt2' (byte BPE)")
    pre = reader.text("pre")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"read {source}: tokenizer.ggml.pre: got {pre!r:.60}, expected one of {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, types = reader.texts("tokens"), reader.token_types()
    backend = _bpe(reader, tokens, ignore_merges=pre in _LLAMA3_NAMES)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    added = zip(tokens, types, strict=True)
    backend.add_tokens(
        [
            AddedToken(text, special=kind == _CONTROL, normalized=False)
            for text, kind in added
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {role: reader.token_id(key, len(tokens)) for role, key in _ROLES.items()}
    _add_special_around(backend, reader, tokens, ids, begins_with_bos=pre in _LLAMA3_NAMES)
    ends = (reader.token_id(key, len(tokens)) for key in _ENDS)
    return HuggingFaceTokenizer(
        backend,
        special_tokens=SpecialTokens(
            **{role: TokenId(token_id) for role, token_id in ids.items() if token_id is not None}
        ),
        stop_token_ids=[token_id for token_id in ends if token_id is not None],
        chat_template=_chat_template(metadata, {role: tokens[i] for role, i in ids.items() if i is not None}),
        model_name=metadata.get("general.name") if isinstance(metadata.get("general.name"), str) else None,
    )


class _Reader:
    """Entries of tokenizer.ggml.*, each checked as it is read."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def fail(self, key: str, got: str, expected: str) -> NoReturn:
        raise InvalidFormatError(f"read {self._source}: tokenizer.ggml.{key}: got {got:.120}, expected {expected}")

    def text(self, key: str) -> str:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, str):
            self.fail(key, type(value).__name__, "a string")
        return value

    def texts(self, key: str) -> Sequence[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, (tuple, list)) or not value or not all(isinstance(text, str) for text in value):
            self.fail(key, type(value).__name__, "an array of strings")
        return value

    def token_types(self) -> list[int]:
        num_tokens = len(self.texts("tokens"))
        value = self._metadata.get("tokenizer.ggml.token_type")
        try:
            types = [int(kind) for kind in value] if value is not None else [1] * num_tokens
        except (TypeError, ValueError):
            self.fail("token_type", type(value).__name__, "an array of integers")
        if len(types) != num_tokens:
            self.fail("token_type", f"{len(types)} entries", f"one for each of {num_tokens} tokens")
        return types

    def token_id(self, key: str, num_tokens: int) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None or (isinstance(value, int) and value == _UNSET):
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_tokens:
            self.fail(key, ascii(value), f"an id below {num_tokens}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            self.fail(key, ascii(value), "true or false")
        return value


def _bpe(reader: _Reader, tokens: Sequence[str], ignore_merges: bool) -> Tokenizer:
    vocabulary = {text: token_id for token_id, text in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(text for token_id, text in enumerate(tokens) if vocabulary[text] != token_id)
        reader.fail("tokens", f"{twice!a} twice", "every token once")
    merges = []
    for rank, merge in enumerate(reader.texts("merges")):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            reader.fail("merges", f"{merge!a} at {rank}", "two tokens with a space between")
        merges.append((left, right))
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    except Exception as error:  # noqa: BLE001  the library raises bare Exceptions
        raise InvalidFormatError(
            f"read {reader._source}: tokenizer.ggml.merges: {' '.join(str(error).split()):.160}"
        ) from None


def _add_special_around(
    backend: Tokenizer,
    reader: _Reader,
    tokens: Sequence[str],
    ids: Mapping[str, int | None],
    begins_with_bos: bool,
) -> None:
    """BOS before and EOS behind every text, where the file asks for them.  [TK-GGUF-3]"""
    begin = ids["bos_token"] if reader.flag("add_bos_token", begins_with_bos) else None
    end = ids["eos_token"] if reader.flag("add_eos_token", False) else None
    around = [token_id for token_id in (begin, end) if token_id is not None]
    if not around:
        return
    head = "" if begin is None else f"{tokens[begin]}:0 "
    tail = "" if end is None else f" {tokens[end]}:0"
    try:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{head}$A:0{tail}", special_tokens=[(tokens[token_id], token_id) for token_id in set(around)]
        )
    except ValueError as error:
        reader.fail("add_bos_token", f"a special token that cannot stand around a text ({error})", "a plain token")


def _chat_template(metadata: Mapping[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    text = metadata.get("tokenizer.chat_template")
    return ChatTemplate(text, special_tokens) if isinstance(text, str) and text else None


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _llama3() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3_NAMES: Final = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS: Final[Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]]] = MappingProxyType(
    {"smollm": _smollm, "gpt-2": _gpt2, **dict.fromkeys(_LLAMA3_NAMES, _llama3)}
)
