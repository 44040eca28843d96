"""The data of the families, and what their traits do by themselves."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces import families
from ferrum_ref.interfaces.families import (
    AudioBuffer,
    EncoderState,
    MultimodalLLM,
    SpeakerRef,
    TranscriptSegment,
)

BAD_SAMPLES: list[Any] = [np.zeros((2, 2)), 0.5, [1.0, math.nan], [math.inf]]


@pytest.mark.clause("FM-DATA-1")
@pytest.mark.parametrize("span", [(-0.1, 1), (2, 1), (0, math.inf), (math.nan, 1), (0, math.nan)])
def test_a_segment_lies_in_time(span: tuple[float, float]) -> None:
    assert TranscriptSegment(0.5, 0.5, "x") == TranscriptSegment(0.5, 0.5, "x")
    with pytest.raises(InvalidParameterError, match="0 <= start <= end"):
        TranscriptSegment(*span, "x")


@pytest.mark.clause("FM-DATA-2")
def test_an_audio_buffer_keeps_float32() -> None:
    samples = np.linspace(-1.5, 1.5, 11025, dtype=np.float32)
    buffer = AudioBuffer(22050, samples)
    assert buffer.samples is samples
    assert buffer.duration_s == 0.5
    assert AudioBuffer(1, [0.1, 0.2]).samples.dtype == np.float32  # type: ignore[arg-type]


@pytest.mark.clause("FM-DATA-2", "FM-DATA-3")
@pytest.mark.parametrize("samples", BAD_SAMPLES, ids=["stereo", "number", "nan", "inf"])
def test_samples_are_one_finite_row(samples: Any) -> None:
    with pytest.raises(InvalidParameterError, match="AudioBuffer"):
        AudioBuffer(16000, samples)
    with pytest.raises(InvalidParameterError, match="SpeakerRef"):
        SpeakerRef(samples, None)


@pytest.mark.clause("FM-DATA-2")
@pytest.mark.parametrize("rate", [0, -1, 2**32, 44100.0])
def test_a_rate_is_a_positive_number_of_32_bits(rate: Any) -> None:
    with pytest.raises(InvalidParameterError, match="sample_rate"):
        AudioBuffer(rate, np.zeros(1, np.float32))
    assert AudioBuffer(2**32 - 1, np.zeros(1, np.float32)).sample_rate == 2**32 - 1


@pytest.mark.clause("FM-DATA-3")
def test_a_speaker_may_say_something_unknown() -> None:
    assert SpeakerRef(np.zeros(3, np.float32), None).ref_text is None
    assert SpeakerRef(np.zeros(3, np.float32), "ah").ref_audio.shape == (3,)


@pytest.mark.clause("FM-DATA-4")
def test_an_encoder_state_has_the_shape_it_says() -> None:
    state = EncoderState(np.arange(6, dtype=np.float32), [2, 3])
    assert state.hidden.reshape(state.shape)[1, 0] == 3
    for hidden, shape in ((np.zeros(5), [2, 3]), (np.zeros((2, 3)), [2, 3])):
        with pytest.raises(BackendError, match="expected 6 flat values"):
            EncoderState(hidden.astype(np.float32), shape)
    for dim in (-1, 2.0):
        with pytest.raises(InvalidParameterError, match="shape"):
            EncoderState(np.zeros(2, np.float32), [dim])  # type: ignore[list-item]


@pytest.mark.clause("FM-DATA-4")
def test_none_of_them_is_serialisable() -> None:
    import json

    from ferrum_ref.interfaces.llm import LlmRuntimeConfig

    for record in (
        AudioBuffer(1, np.zeros(1, np.float32)),
        SpeakerRef(np.zeros(1, np.float32), None),
        EncoderState(np.zeros(1, np.float32), [1]),
        TranscriptSegment(0, 1, ""),
        LlmRuntimeConfig(1, 1, 1, 1, 1, 1),
    ):
        assert not hasattr(record, "to_json")
        with pytest.raises(TypeError):
            json.dumps(record)


@pytest.mark.clause("FM-AUDIO-1")
def test_a_model_without_ears_hears_nothing() -> None:
    class Blind(MultimodalLLM):
        """Only the trait's own bodies are called."""

    Blind.__abstractmethods__ = frozenset()
    model = Blind()  # type: ignore[abstract]
    heard = model.encode_audio(np.ones(16000, np.float32))
    assert (heard.shape, heard.dtype) == ((0,), np.float32)
    with pytest.raises(UnsupportedError, match="Blind"):
        model.prefill_with_images("a", [1], [])


@pytest.mark.parametrize(
    ("trait", "methods"),
    [
        ("MultimodalLLM", {"encode_image", "config", "prefill", "decode", "release"}),
        ("EncoderDecoderLM", {"encode", "decode_step", "release"}),
        ("EmbeddingModel", {"embed"}),
        ("Transcriber", {"transcribe"}),
        ("TtsModel", {"synthesize"}),
    ],
)
def test_what_an_implementation_owes(trait: str, methods: set[str]) -> None:
    assert inspect.isabstract(getattr(families, trait))
    assert set(getattr(families, trait).__abstractmethods__) == methods
