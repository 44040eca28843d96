"""A sentence spoken by one model, and written down by the other."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from ferrum_ref.cli.cache import cache_dir
from ferrum_ref.families import load_speech, load_transcriber
from ferrum_ref.interfaces.families_data import TranscriptSegment
from ferrum_ref.models.audio.resample import resample
from ferrum_ref.models.source import pull_model

FOX = "[[ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ.]]"


@pytest.fixture(scope="module")
def whisper_path() -> Path:
    """The real Whisper base; fetched into the user's cache on first use."""
    return pull_model("whisper-base", cache_dir(argparse.Namespace(cache_dir=None)))


@pytest.mark.clause("FM-WHISPER-17", "FM-SPEECH-2", "FM-CT2-1")
@pytest.mark.slow
@pytest.mark.model
def test_the_words_come_back(joe_path: Path, whisper_path: Path) -> None:
    spoken = load_speech(joe_path).synthesize(FOX, None)
    heard = resample(spoken.samples, spoken.sample_rate, 16000)
    transcriber = load_transcriber(whisper_path)
    assert len(transcriber.tokens.languages) == 99
    (segment,) = transcriber.transcribe(heard, None)
    assert segment.text == "The quick brown fox jumps over the lazy dog."
    assert segment.start_sec <= 0.3
    assert abs(segment.end_sec - len(heard) / 16000) <= 0.3
    assert transcriber.detect_language(heard) == "en"


@pytest.mark.clause("FM-WHISPER-15", "FM-WHISPER-17")
@pytest.mark.slow
@pytest.mark.model
def test_more_than_one_window(joe_path: Path, whisper_path: Path) -> None:
    """Twelve sentences of 2.8 s: more than a window's 30 s, and every one comes back, those of the second in place."""
    spoken = load_speech(joe_path).synthesize(FOX, None)
    heard = np.tile(resample(spoken.samples, spoken.sample_rate, 16000), 12)
    segments: list[TranscriptSegment] = load_transcriber(whisper_path).transcribe(heard, "en")
    assert " ".join(each.text for each in segments) == " ".join(["The quick brown fox jumps over the lazy dog."] * 12)
    heard_before = 0
    for each in segments:
        assert abs(each.start_sec - heard_before * len(heard) / 12 / 16000) < 0.5
        heard_before += each.text.count("fox")
