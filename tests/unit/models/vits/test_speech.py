"""The speech contract over VITS, and loading voices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import InvalidFormatError, ModelError, NotFoundError, UnsupportedError
from ferrum_ref.families import load_speech
from ferrum_ref.interfaces.families import TtsModel
from ferrum_ref.interfaces.families_data import AudioBuffer, SpeakerRef
from ferrum_ref.models.vits import SpeechControls


@pytest.mark.clause("FM-TTS-1", "FM-LOAD-4")
def test_equal_arguments_give_equal_sound(voice_directory: Path) -> None:
    speech = load_speech(voice_directory)
    assert isinstance(speech, TtsModel)
    first = speech.synthesize("abc def", None)
    assert isinstance(first, AudioBuffer)
    assert first.sample_rate == speech.sample_rate == 8000
    assert len(first.samples) > 100
    speech.synthesize("gh", None)
    np.testing.assert_array_equal(speech.synthesize("abc def", None).samples, first.samples)
    np.testing.assert_array_equal(
        load_speech(voice_directory, seed=0).synthesize("abc def", None).samples, first.samples
    )
    for other in (
        load_speech(voice_directory, seed=1),
        load_speech(voice_directory, controls=SpeechControls(speed=0.5)),
    ):
        assert not np.array_equal(other.synthesize("abc def", None).samples, first.samples)


@pytest.mark.clause("FM-TTS-2")
def test_nothing_to_speak(voice_directory: Path, piper_directory: Path) -> None:
    for speech in (load_speech(voice_directory), load_speech(piper_directory)):
        for text in ("", "  ", "'-"):
            with pytest.raises(ModelError, match="nothing in the text can be spoken"):
                speech.synthesize(text, None)
    with pytest.raises(ModelError, match="no sound for x y"):
        load_speech(voice_directory).synthesize("xy", None)
    with pytest.raises(ModelError, match="no sound for θ"):
        load_speech(piper_directory).synthesize("[[θ]]", None)


@pytest.mark.clause("FM-TTS-3")
def test_a_speaker_is_never_ignored(voice_directory: Path) -> None:
    speaker = SpeakerRef(np.zeros(10, np.float32), None)
    with pytest.raises(UnsupportedError, match="only its own voice"):
        load_speech(voice_directory).synthesize("abc", speaker)


@pytest.mark.clause("FM-VITS-11", "FM-PHONEME-3")
def test_sentences_and_pauses(piper_directory: Path) -> None:
    speech = load_speech(piper_directory)
    utterance = speech.reader.read("[[abc. de. f]]")
    assert len(utterance.sentences) == 3
    pieces = list(speech.pieces(utterance))
    assert [len(piece) for piece in pieces[1::2]] == [1600, 1600]
    assert not any(piece.any() for piece in pieces[1::2])
    generator = np.random.default_rng(0)
    for ids, piece in zip(utterance.sentences, pieces[::2], strict=True):
        np.testing.assert_array_equal(speech.model.speak(ids, generator.standard_normal), piece)
    whole = speech.synthesize("[[abc. de. f]]", None).samples
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.clause("FM-LOAD-4", "FM-PHONEME-5")
def test_how_text_becomes_phonemes(piper_directory: Path) -> None:
    asked = []

    def phonemize(text: str) -> str:
        asked.append(text)
        return "abc"

    speech = load_speech(piper_directory, phonemize=phonemize)
    found = speech.synthesize("some words", None).samples
    assert asked == ["some words"]
    np.testing.assert_array_equal(found, load_speech(piper_directory).synthesize("[[abc]]", None).samples)


@pytest.mark.clause("FM-LOAD-4")
def test_where_voices_lie(piper_directory: Path, tmp_path: Path) -> None:
    file = piper_directory / "voice.onnx"
    by_file = load_speech(file).synthesize("[[abc]]", None)
    np.testing.assert_array_equal(by_file.samples, load_speech(piper_directory).synthesize("[[abc]]", None).samples)
    with pytest.raises(UnsupportedError, match="expected a Piper voice"):
        load_speech(piper_directory / "voice.onnx.json")
    with pytest.raises(NotFoundError, match="neither a"):
        load_speech(tmp_path)
    for name in ("one.onnx", "two.onnx"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(UnsupportedError, match="got 2"):
        load_speech(tmp_path)
    with pytest.raises(NotFoundError, match=r"one\.onnx\.json"):
        load_speech(tmp_path / "one.onnx")
    with pytest.raises(NotFoundError, match="ferrum-ref pull piper-joe"):
        load_speech("piper-joe", cache_dir=tmp_path)


@pytest.mark.clause("FM-LOAD-4", "FM-PHONEME-5")
@pytest.mark.parametrize("name", [5, "", "--help", "en us", ["en"]])
def test_voices_whose_language_is_no_name(
    piper_directory: Path, piper_voice: dict[str, Any], tmp_path: Path, name: Any
) -> None:
    (tmp_path / "v.onnx").write_bytes((piper_directory / "voice.onnx").read_bytes())
    (tmp_path / "v.onnx.json").write_text(json.dumps({**piper_voice, "espeak": {"voice": name}}))
    with pytest.raises(InvalidFormatError, match=r"espeak\.voice"):
        load_speech(tmp_path)


@pytest.mark.clause("FM-LOAD-4")
def test_directories_without_letters(voice_directory: Path, tmp_path: Path, new_voice: Callable[..., Any]) -> None:
    for name in ("config.json", "model.safetensors", "vocab.json"):
        (tmp_path / name).write_bytes((voice_directory / name).read_bytes())
    with pytest.raises(NotFoundError, match=r"tokenizer_config\.json"):
        load_speech(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="phonemize"):
        load_speech(tmp_path)
