"""The encoder-decoder contract over Whisper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    FerrumError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
)
from ferrum_ref.families import load_transcriber
from ferrum_ref.interfaces.families import EncoderDecoderLM
from ferrum_ref.interfaces.families_data import EncoderState
from ferrum_ref.models.audio.mel import log_mel, mel_filters
from ferrum_ref.models.whisper import WhisperModel
from ferrum_ref.models.whisper_lm import WhisperLm


def sound(seed: int, count: int = 5000) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(-(2**15), 2**15, count)]


@pytest.fixture(scope="module")
def model(whisper_directory: Path) -> WhisperModel:
    return load_transcriber(whisper_directory).model


@pytest.fixture
def lm(model: WhisperModel) -> WhisperLm:
    return WhisperLm(model)


@pytest.mark.clause("FM-ENCDEC-1", "FM-ENCDEC-3", "FM-WHISPER-9")
def test_against_transformers(lm: WhisperLm, judge: Any) -> None:
    assert isinstance(lm, EncoderDecoderLM)
    heard = sound(0)
    state = lm.encode("a", heard)
    assert state.shape == [20, 24]
    assert state.hidden.dtype == np.float32
    features = log_mel(np.array(heard, np.float32) / 32768, 40, mel_filters(8))
    ids = [61, 62, 65, 70, 5]
    judged = judge.run(features, ids)
    exact, bound = judged["encoded"]
    assert np.abs(state.hidden.reshape(20, 24) - exact).max() <= bound
    exact, bound = judged["logits"]
    for position, token in enumerate(ids):
        logits = lm.decode_step("a", token, position, state)
        assert logits.dtype == np.float32
        assert logits.shape == (100,)
        assert np.abs(logits - exact[position]).max() <= bound


@pytest.mark.clause("FM-ENCDEC-1")
def test_a_state_depends_on_the_input_alone(lm: WhisperLm) -> None:
    first = lm.encode("a", sound(1))
    lm.decode_step("a", 61, 0, first)
    again, other = lm.encode("b", sound(1)), lm.encode("c", sound(2))
    np.testing.assert_array_equal(first.hidden, again.hidden)
    assert not np.array_equal(first.hidden, other.hidden)
    # any state under any id
    np.testing.assert_array_equal(lm.decode_step("c", 61, 0, first), lm.decode_step("b", 61, 0, again))


@pytest.mark.clause("FM-WHISPER-9")
def test_whole_numbers_and_floats(lm: WhisperLm) -> None:
    numbers = lm.encode("a", [16384, -32768, 0, 32767])
    floats = lm.encode_pcm("b", np.array([0.5, -1.0, 0.0, 32767 / 32768], np.float32))
    np.testing.assert_array_equal(numbers.hidden, floats.hidden)
    with pytest.raises(InvalidParameterError, match="sample 1 is nan"):
        lm.encode_pcm("c", np.array([0, np.nan], np.float32))
    lm.encode_pcm("c", np.zeros(6400, np.float32))  # a refused call started nothing


@pytest.mark.clause("FM-ENCDEC-2")
def test_inputs_that_are_refused_start_no_cache(lm: WhisperLm) -> None:
    for heard, error, text in (
        ([], ModelError, "empty"),
        (sound(0, 6401), ResourceExhaustedError, "6401 samples, but a window holds 6400"),
        ([0, 32768], InvalidParameterError, "got 32768"),
        ([0, -32769], InvalidParameterError, "got -32769"),
        ([0, 0.5], InvalidParameterError, "whole numbers"),
        ([[0, 1]], InvalidParameterError, "one row"),
    ):
        with pytest.raises(error, match=text):
            lm.encode("a", heard)  # type: ignore[arg-type]
        with pytest.raises(NotFoundError, match="encode under this id first"):
            lm.decode_step("a", 61, 0, EncoderState(np.zeros(480, np.float32), [20, 24]))
    state = lm.encode("a", sound(0, 6400))
    before = lm.decode_step("a", 61, 0, state)
    with pytest.raises(AlreadyExistsError, match="'a' is live"):
        lm.encode("a", sound(1))
    lm.encode("b", sound(0, 6400))
    np.testing.assert_array_equal(before, lm.decode_step("b", 61, 0, state))
    np.testing.assert_array_equal(lm.decode_step("a", 62, 1, state), lm.decode_step("b", 62, 1, state))


@pytest.mark.clause("FM-ENCDEC-4")
def test_a_cache_belongs_to_one_state(lm: WhisperLm) -> None:
    state, other = lm.encode("a", sound(3)), lm.encode("b", sound(4))
    lm.decode_step("a", 61, 0, state)
    with pytest.raises(ModelError, match="another encoder state"):
        lm.decode_step("a", 62, 1, other)
    copy = EncoderState(state.hidden.copy(), [20, 24])
    after = lm.decode_step("a", 62, 1, copy)
    lm.decode_step("b", 61, 0, state)
    np.testing.assert_array_equal(after, lm.decode_step("b", 62, 1, state))
    lm.encode("c", sound(5))
    for shape in ([480], [24, 20], [0, 24], [20, 24, 1]):
        size = int(np.prod(shape))
        with pytest.raises(BackendError, match=r"expected \[S, 24\]"):
            lm.decode_step("c", 61, 0, EncoderState(np.zeros(size, np.float32), shape))
    shorter = EncoderState(state.hidden[:240], [10, 24])  # fewer rows: another sound, and allowed
    assert np.isfinite(lm.decode_step("c", 61, 0, shorter)).all()


@pytest.mark.clause("FM-ENCDEC-5", "FM-ENCDEC-3")
def test_steps_that_are_refused_change_nothing(lm: WhisperLm) -> None:
    state = lm.encode("a", sound(6))
    lm.encode("b", sound(6))
    calls: list[tuple[str, int, int, type[FerrumError]]] = [
        ("nobody", 61, 0, NotFoundError),
        ("a", 61, 1, ModelError),
        ("a", 100, 0, InvalidParameterError),
        ("a", -1, 0, InvalidParameterError),
    ]
    for cache_id, token, position, error in calls:
        with pytest.raises(error):
            lm.decode_step(cache_id, token, position, state)
    lm.encode("c", sound(7))
    with pytest.raises(InvalidParameterError):
        lm.decode_step("c", 100, 0, EncoderState(np.ones(480, np.float32), [20, 24]))
    lm.decode_step("c", 61, 0, state)  # the refused step chose no state
    for position in range(32):
        token = 5 + position
        np.testing.assert_array_equal(
            lm.decode_step("a", token, position, state), lm.decode_step("b", token, position, state)
        )
        with pytest.raises(ModelError, match=f"position {position} for 'a', but its cache holds {position + 1}"):
            lm.decode_step("a", token, position, state)
    with pytest.raises(ResourceExhaustedError, match="32 positions"):
        lm.decode_step("a", 5, 32, state)
    with pytest.raises(ResourceExhaustedError, match="32 positions"):
        lm.decode_step("a", 5, 32, state)


@pytest.mark.clause("FM-ENCDEC-6")
def test_release(lm: WhisperLm) -> None:
    lm.release("nobody")
    state = lm.encode("a", sound(7))
    first = lm.decode_step("a", 61, 0, state)
    lm.release("a")
    with pytest.raises(NotFoundError):
        lm.decode_step("a", 62, 1, state)
    lm.encode("a", sound(8))
    np.testing.assert_array_equal(lm.decode_step("a", 61, 0, state), first)  # the first step chooses the state anew


@pytest.mark.clause("FM-ENCDEC-3")
def test_several_tokens_at_once(lm: WhisperLm, judge: Any) -> None:
    state = lm.encode("a", sound(9))
    features = log_mel(np.array(sound(9), np.float32) / 32768, 40, mel_filters(8))
    exact, bound = judge.run(features, [61, 62, 65])["logits"]
    logits = lm.decode_tokens("a", [61, 62, 65], 0, state)
    assert np.abs(logits - exact[-1]).max() <= bound
    with pytest.raises(ModelError, match="holds 3 tokens"):
        lm.decode_tokens("a", [5], 0, state)
