"""Byte-level BPE from GGUF metadata, and how each kind of `tokenizer.ggml.pre` splits a text.  [TK-GGUF-1, TK-GGUF-5]

A split that is nearly right changes ids without a word, so a kind that is not listed is refused by its name.
Source: llama.cpp, llama-vocab.cpp; transformers, gguf_tokenizer_mapping.py; the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.tokenizer.gguf_metadata import GgufVocabulary

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2: Final = _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN35: Final = _ENDING + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_SEED_CODER: Final = _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)
_GPT4O: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)
_CASED_LETTERS: Final = (  # code points, since editors and channels compose letters
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
_CJK: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def _letters() -> str:
    """The cased letters as the inside of a character class."""
    ends = (part.split("-") for part in _CASED_LETTERS.split())
    return "".join("-".join(chr(int(end, 16)) for end in pair) for pair in ends)


_DEEPSEEK_LLM: Final = (
    "[\r\n]",
    rf"\s?[{_letters()}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER: Final = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK_V3: Final = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _SPACES,
)
_BLOOM: Final = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True, slots=True)
class PreKind:
    """How a kind splits: by each expression in turn.  [TK-GGUF-5]"""

    splits: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is taken as it is, though no merge may build it
    begins_with_bos: bool = False  # where the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_KINDS: Final = (
    (
        "default gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais"
        " trillion granite-docling exaone4",
        PreKind((_GPT2,)),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b", PreKind((r"\p{N}", _GPT2))),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreKind((_LLAMA3,), whole_words=True, begins_with_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreKind((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreKind((_QWEN2,))),
    ("qwen35", PreKind((_QWEN35,))),
    ("tekken", PreKind((_TEKKEN,), whole_words=True, begins_with_bos=True)),
    ("gpt-4o llama4 kanana2 minimax-m2 talkie", PreKind((_GPT4O,))),
    ("deepseek-llm", PreKind(_DEEPSEEK_LLM)),
    ("deepseek-coder", PreKind(_DEEPSEEK_CODER)),
    ("deepseek-v3 step35 hunyuan-dense joyai-llm", PreKind(_DEEPSEEK_V3)),
    ("falcon", PreKind((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", PreKind((_BLOOM,))),
    ("viking", PreKind((_BLOOM, r"\p{N}"))),
    ("seed-coder", PreKind((_SEED_CODER,))),
)
PRE_KINDS: Final[Mapping[str, PreKind]] = MappingProxyType(
    {name: kind for names, kind in _KINDS for name in names.split()}
)


def byte_level(vocabulary: GgufVocabulary) -> tuple[Tokenizer, PreKind]:
    """The pipeline of `tokenizer.ggml.model` "gpt2" without its added tokens, and its kind.  Pure.

    Raises UnsupportedError on an unknown kind, InvalidFormatError on merges that the tokens do not have.
    """
    pre = vocabulary.text("pre")
    if pre not in PRE_KINDS:
        raise UnsupportedError(
            f"read {vocabulary.source}: tokenizer.ggml.pre: got {pre!r:.60}, expected one of {', '.join(PRE_KINDS)}"
        )
    kind = PRE_KINDS[pre]
    merges = []
    for rank, merge in enumerate(vocabulary.texts("merges")):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            vocabulary.fail("merges", f"{merge!a} at {rank}", "two tokens with a space between")
        merges.append((left, right))
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=kind.whole_words))
    except Exception as error:  # noqa: BLE001  the library raises bare Exceptions
        raise InvalidFormatError(
            f"read {vocabulary.source}: tokenizer.ggml.merges: {' '.join(str(error).split()):.160}"
        ) from None
    backend.pre_tokenizer = kind.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, kind
