"""From text to the ids of a voice: phonemes by a table, letters by a vocabulary, one list of ids for each sentence.

Clauses: FM-PHONEME-1..5 (specs/audio.md).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import quoted

Phonemize = Callable[[str], str]
"""Text to phonemes in the international phonetic alphabet, punctuation kept."""

_RAW: Final = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_SENTENCE_END: Final = re.compile(r"(?<=[.?!])\s+")
_BEGIN, _END, _BLANK = "^", "$", "_"


@dataclass(frozen=True, slots=True)
class Utterance:
    """What can be spoken of a text: ids sentence by sentence; and what the voice has no sound for, in order."""

    sentences: tuple[tuple[int, ...], ...]
    ignored: tuple[str, ...]


class TextReader(Protocol):
    """Text to ids."""

    def read(self, text: str) -> Utterance: ...


@dataclass(frozen=True, slots=True)
class PhonemeReader:
    """Ids of phonemes as Piper lays them out: ^ _ p1 _ p2 _ ... $, where _ is the blank.  [FM-PHONEME-1..3]"""

    table: Mapping[str, tuple[int, ...]]
    phonemize: Phonemize

    def read(self, text: str) -> Utterance:
        """[[...]] holds phonemes as they are, everything else goes through `phonemize`.  [FM-PHONEME-2]

        Raises what `phonemize` raises.
        """
        return self.read_phonemes(phonemes_of(text, self.phonemize))

    def read_phonemes(self, phonemes: str) -> Utterance:
        """A sentence ends at . ? or ! and a space; one without any sound is left out.  [FM-PHONEME-3]"""
        sentences, ignored = [], []
        for sentence in _SENTENCE_END.split(unicodedata.normalize("NFD", phonemes.strip())):
            known = [each for each in sentence if each in self.table]
            ignored += [each for each in sentence if each not in self.table and not each.isspace()]
            if any(not _is_silent(each) for each in known):
                sentences.append(self._ids(known))
        return Utterance(tuple(sentences), tuple(dict.fromkeys(ignored)))

    def _ids(self, known: list[str]) -> tuple[int, ...]:
        ids = [*self.table.get(_BEGIN, ()), *self.table.get(_BLANK, ())]
        for each in known:
            ids += [*self.table[each], *self.table.get(_BLANK, ())]
        return (*ids, *self.table.get(_END, ()))


@dataclass(frozen=True, slots=True)
class LetterReader:
    """Ids of letters with a blank around each of them, as transformers' VitsTokenizer gives them.  [FM-PHONEME-4]"""

    table: Mapping[str, int]
    has_blanks: bool
    lowers: bool

    def read(self, text: str) -> Utterance:
        """Lowered where the voice knows no capital, unknown characters left out; one sentence."""
        known: list[str] = []
        ignored: list[str] = []
        for each in text:
            letter = each if each in self.table or not self.lowers else each.lower()
            (known if letter in self.table else ignored).append(letter)
        plain = "".join(known).strip()
        if not any(each.isalnum() for each in plain):
            return Utterance((), tuple(dict.fromkeys(ignored)))
        ids = [self.table[each] for each in plain]
        if self.has_blanks:
            ids = [0, *(each for letter in ids for each in (letter, 0))]
        return Utterance((tuple(ids),), tuple(each for each in dict.fromkeys(ignored) if not each.isspace()))


def phonemes_of(text: str, phonemize: Phonemize) -> str:
    """The text's phonemes, those in [[...]] as they are.  [FM-PHONEME-2]"""
    found, position = [], 0
    for match in _RAW.finditer(text):
        found += [_phonemes(text[position : match.start()], phonemize), match[1].strip()]
        position = match.end()
    found.append(_phonemes(text[position:], phonemize))
    return " ".join(each for each in found if each)


def _phonemes(text: str, phonemize: Phonemize) -> str:
    """Punctuation by itself stays as it is."""
    return (phonemize(text) if any(each.isalnum() for each in text) else text).strip()


def plain_phonemes(text: str) -> str:
    """For voices of phoneme_type "text": the letters are the phonemes.  Pure."""
    return text.casefold()


def phoneme_reader(voice: Mapping[str, Any], vocab_size: int, phonemize: Phonemize, source: str) -> PhonemeReader:
    """Of a Piper voice's JSON file.  [FM-PHONEME-1]

    Raises InvalidFormatError (no table, an id outside the vocabulary), UnsupportedError (phoneme_type).
    """
    kind = voice.get("phoneme_type", "espeak")
    if kind not in ("espeak", "text"):
        raise UnsupportedError(f"read {source}: phoneme_type: got {quoted(kind)}, expected 'espeak' or 'text'")
    stored = voice.get("phoneme_id_map")
    if not isinstance(stored, Mapping) or not stored:
        raise InvalidFormatError(
            f"read {source}: phoneme_id_map: got {quoted(stored)}, expected phonemes with their ids"
        )
    table = {}
    for phoneme, ids in stored.items():
        if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < vocab_size for each in ids):
            raise InvalidFormatError(
                f"read {source}: phoneme_id_map: {quoted(phoneme)}: got {quoted(ids)}, expected ids below {vocab_size}"
            )
        table[phoneme] = tuple(ids)
    return PhonemeReader(MappingProxyType(table), phonemize if kind == "espeak" else plain_phonemes)


def letter_reader(
    vocabulary: Mapping[str, Any], settings: Mapping[str, Any], vocab_size: int, source: str
) -> LetterReader:
    """Of a Hugging Face directory's vocab.json and tokenizer_config.json.  [FM-PHONEME-4]

    Raises InvalidFormatError (ids), UnsupportedError (a tokenizer that needs phonemes or another alphabet first).
    """
    for field in ("phonemize", "is_uroman"):
        if settings.get(field, field == "phonemize"):
            raise UnsupportedError(
                f"read {source}: {field}: got true, expected false: a voice that reads plain letters"
            )
    table = {}
    for letter, each in vocabulary.items():
        if type(each) is not int or not 0 <= each < vocab_size:
            raise InvalidFormatError(
                f"read {source}: {quoted(letter)}: got {quoted(each)}, expected an id below {vocab_size}"
            )
        if len(letter) == 1:
            table[letter] = each
    return LetterReader(
        MappingProxyType(table), bool(settings.get("add_blank", True)), bool(settings.get("normalize", True))
    )


def _is_silent(phoneme: str) -> bool:
    """Spaces, punctuation, stress and length marks make no sound by themselves."""
    return not unicodedata.category(phoneme[0]).startswith("L") or phoneme in "ˈˌːˑ"
