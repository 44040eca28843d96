"""The special tokens of a Whisper vocabulary, and the tokens that a transcript never holds.

Clauses: FM-WHISPER-10..11 (specs/audio.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import quoted

TIMESTAMP_S: Final = 0.02  # seconds from one timestamp token to the next
_LANGUAGE: Final = re.compile(r"<\|([a-z]{2,3})\|>")
_SILENCES: Final = ("<|nospeech|>", "<|nocaptions|>")  # the same token by its two names
_NEVER: Final = ("<|translate|>", "<|startoflm|>", "<|startofprev|>")
_SUPPRESSED: Final = (
    ("suppress_tokens", "begin_suppress_tokens"),  # generation_config.json
    ("suppress_ids", "suppress_ids_begin"),  # CTranslate2's config.json
)


@dataclass(frozen=True, slots=True)
class WhisperTokens:
    """Ids by role. Timestamps are all ids from `first_timestamp` on: 0.00 s, 0.02 s, ...  [FM-WHISPER-10]"""

    vocab_size: int
    start: int
    end: int
    transcribe: int | None  # None: a model of one language
    no_timestamps: int
    no_speech: int | None
    languages: Mapping[str, int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    @property
    def first_timestamp(self) -> int:
        return self.no_timestamps + 1

    @staticmethod
    def from_vocabulary(
        token_id: Callable[[str], int | None],
        token_text: Callable[[int], str | None],
        vocab_size: int,
        generation: Mapping[str, Any],
        source: str,
    ) -> WhisperTokens:
        """Look the roles up by their texts.  Pure.  [FM-WHISPER-10..11]

        `generation`: generation_config.json, or CTranslate2's config.json. Raises InvalidFormatError (a role without
        token, an id outside the vocabulary).
        """

        def required(text: str) -> int:
            found = token_id(text)
            if found is None or found >= vocab_size:
                raise InvalidFormatError(f"read {source}: token {text}: got {found}, expected an id below {vocab_size}")
            return found

        start, no_timestamps = required("<|startoftranscript|>"), required("<|notimestamps|>")
        languages = _languages(token_text, start, vocab_size)
        silences = [found for text in _SILENCES if (found := token_id(text)) is not None and found < vocab_size]
        never = [found for text in _NEVER if (found := token_id(text)) is not None and found < vocab_size]
        transcribe = required("<|transcribe|>") if languages else None
        always = {start, no_timestamps, *silences, *never} | (set() if transcribe is None else {transcribe})
        suppressed, first = _suppressed(generation, vocab_size, source)
        return WhisperTokens(
            vocab_size=vocab_size,
            start=start,
            end=required("<|endoftext|>"),
            transcribe=transcribe,
            no_timestamps=no_timestamps,
            no_speech=silences[0] if silences else None,
            languages=MappingProxyType(languages),
            suppressed=tuple(sorted(always.union(suppressed))),
            suppressed_first=tuple(sorted(set(first))),
        )

    def language_token(self, language: str) -> int | None:
        """The token of a language; None in a model of one language, which is English.  [FM-SPEECH-2]

        Raises UnsupportedError (a language that the model does not know).
        """
        if not self.languages:
            if language != "en":
                raise UnsupportedError(
                    f"transcribe: language {quoted(language)}, expected 'en': the model knows no other"
                )
            return None
        if language not in self.languages:
            known = ", ".join(sorted(self.languages))
            raise UnsupportedError(f"transcribe: language {quoted(language)}, expected one of {known}")
        return self.languages[language]


def _languages(token_text: Callable[[int], str | None], start: int, vocab_size: int) -> dict[str, int]:
    """The tokens <|xx|> that follow the start token one by one."""
    found: dict[str, int] = {}
    for token in range(start + 1, vocab_size):
        match = _LANGUAGE.fullmatch(token_text(token) or "")
        if match is None:
            break
        found[match[1]] = token
    return found


def _suppressed(generation: Mapping[str, Any], vocab_size: int, source: str) -> tuple[list[int], list[int]]:
    for names in _SUPPRESSED:
        if any(name in generation for name in names):
            always, first = (_ids(generation.get(name), name, vocab_size, source) for name in names)
            return always, first
    return [], []


def _ids(value: Any, name: str, vocab_size: int, source: str) -> list[int]:
    """A list of ids; null and [-1] mean none."""
    if value is None or value == [-1]:
        return []
    if isinstance(value, list) and all(type(each) is int and 0 <= each < vocab_size for each in value):
        return list(value)
    raise InvalidFormatError(f"read {source}: {name}: got {quoted(value)}, expected ids from 0 to {vocab_size - 1}")
