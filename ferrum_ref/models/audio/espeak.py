"""Phonemes of plain text by the program espeak-ng, where a machine has it.  Clause: FM-PHONEME-5 (specs/audio.md)."""

from __future__ import annotations

import re
import subprocess
from typing import Final

from ferrum_ref.errors import FerrumIOError, UnsupportedError

PROGRAMS: Final = ("espeak-ng", "espeak")
_CLAUSE: Final = re.compile(r"([^.,;:?!]+)([.,;:?!]*)")
_LANGUAGE_SWITCH: Final = re.compile(r"\([a-z]{2,3}(?:-[a-z0-9-]+)?\)")
_TIME_LIMIT_S: Final = 60


class EspeakPhonemizer:
    """Text to phonemes, clause by clause, punctuation kept.  [FM-PHONEME-5]"""

    def __init__(self, voice: str, programs: tuple[str, ...] = PROGRAMS) -> None:
        """`voice`: espeak's name of a language, "en-us"; `programs` are tried in order, on first use."""
        self._voice = voice
        self._programs = programs

    def __call__(self, text: str) -> str:
        """Raises UnsupportedError (no such program), FerrumIOError (it failed)."""
        found = []
        for words, marks in _CLAUSE.findall(" ".join(text.split())):
            if any(each.isalnum() for each in words):
                found.append(_LANGUAGE_SWITCH.sub("", " ".join(self._run(words.strip()).split())) + marks)
        return " ".join(found)

    def _run(self, words: str) -> str:
        for program in self._programs:
            command = [program, "-q", "--ipa", "-v", self._voice, "--stdin"]
            try:
                done = subprocess.run(
                    command, input=words, capture_output=True, timeout=_TIME_LIMIT_S, encoding="utf-8", errors="replace"
                )
            except FileNotFoundError:
                continue
            except (OSError, subprocess.TimeoutExpired) as error:
                raise FerrumIOError(f"run {program}: {type(error).__name__}: {error}") from None
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
                raise FerrumIOError(f"run {program}: exit code {done.returncode}: {reason[0]:.200}")
            return done.stdout
        raise UnsupportedError(
            f"speak plain text: none of the programs {', '.join(self._programs)} is on this machine; install espeak-ng"
            " (apt install espeak-ng, brew install espeak-ng), or give phonemes: [[həlˈoʊ wˈɜːld]]"
        )
