"""Mel pictures, against transformers' WhisperFeatureExtractor and a float64 formula of scipy's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.signal
import transformers
import transformers.audio_utils
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError
from ferrum_ref.models.audio.mel import hz_from_mel, log_mel, mel_filters, mel_from_hz


def exact_log_mel(samples: Any, frames: int, bands: int) -> Any:
    """By scipy's short-time transform, in float64."""
    whole = np.zeros(160 * frames)
    whole[: len(samples)] = samples
    padded = np.pad(whole, 200, mode="reflect")
    window = scipy.signal.get_window("hann", 400, fftbins=True)
    _, _, transform = scipy.signal.stft(
        padded, window=window, nperseg=400, noverlap=240, boundary=None, padded=False, scaling="spectrum"
    )
    power = (np.abs(transform) * window.sum())[:, :frames] ** 2
    filters = transformers.audio_utils.mel_filter_bank(
        201, bands, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney"
    )
    decades = np.log10(np.maximum(filters.T @ power, 1e-10))
    return (np.maximum(decades, decades.max() - 8) + 4) / 4


def sound(kind: str, count: int) -> Any:
    rng = np.random.default_rng(len(kind))
    times = np.arange(count) / 16000
    return {
        "noise": rng.standard_normal(count) * 0.1,
        "tone": 0.5 * np.sin(2 * np.pi * 440 * times),
        "click": np.eye(1, count, count // 2)[0],
        "zeros": np.zeros(count),
        "loud": rng.standard_normal(count) * 1e4,
    }[kind].astype(np.float32)


@pytest.mark.clause("FM-MEL-1")
def test_the_scale() -> None:
    assert float(mel_from_hz(1000.0)) == pytest.approx(15)
    assert float(mel_from_hz(6400.0)) == pytest.approx(42)
    hz = np.linspace(0, 8000, 999)
    expected = transformers.audio_utils.hertz_to_mel(hz, mel_scale="slaney")
    assert np.abs(mel_from_hz(hz) - expected).max() < 1e-12 * 45
    assert np.abs(hz_from_mel(mel_from_hz(hz)) - hz).max() < 1e-11 * 8000


@pytest.mark.clause("FM-MEL-2")
@pytest.mark.parametrize("bands", [1, 8, 80, 128])
def test_filters(bands: int) -> None:
    expected = transformers.audio_utils.mel_filter_bank(
        201, bands, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney"
    )
    found = mel_filters(bands)
    assert found.shape == (bands, 201)
    assert np.abs(found - expected.T).max() < 1e-14
    for wrong in (0, -1):
        with pytest.raises(InvalidParameterError, match="num_bands"):
            mel_filters(wrong)


@pytest.mark.clause("FM-MEL-3")
@pytest.mark.parametrize("kind", ["noise", "tone", "click", "zeros", "loud"])
@pytest.mark.parametrize("bands", [80, 128])
def test_pictures(kind: str, bands: int) -> None:
    samples = sound(kind, 30_000)
    found = log_mel(samples, 200, mel_filters(bands))
    exact = exact_log_mel(samples, 200, bands)
    assert (found.shape, found.dtype) == ((bands, 200), np.float32)
    assert np.abs(found - exact).max() <= 2**-23 * np.abs(exact).max()
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands, chunk_length=2)
    theirs = extractor(samples, sampling_rate=16000, return_tensors="np").input_features[0]
    assert np.abs(found - exact).max() <= 4 * np.abs(theirs - exact).max() + 2**-24


@pytest.mark.clause("FM-MEL-3")
def test_a_whole_window() -> None:
    samples = sound("noise", 480_000)
    exact = exact_log_mel(samples, 3000, 80)
    assert np.abs(log_mel(samples, 3000, mel_filters(80)) - exact).max() <= 2**-23 * np.abs(exact).max()


@pytest.mark.clause("FM-MEL-4")
@given(st.integers(1, 9), st.integers(0, 1500))
def test_any_length(frames: int, count: int) -> None:
    samples = sound("noise", max(count, 1))[:count]
    kept = samples.copy()
    if count > 160 * frames:
        with pytest.raises(ResourceExhaustedError, match=f"{count} samples, expected at most {160 * frames}"):
            log_mel(samples, frames, mel_filters(4))
    else:
        found = log_mel(samples, frames, mel_filters(4))
        assert found.shape == (4, frames)
        assert np.isfinite(found).all()
        assert np.ptp(found) <= 2 + 1e-6  # eight decades, quartered
    np.testing.assert_array_equal(samples, kept)


@pytest.mark.clause("FM-MEL-4")
def test_samples_that_are_refused() -> None:
    for wrong in (np.array([np.nan]), np.zeros((2, 3)), np.array([0, -np.inf])):
        with pytest.raises(InvalidParameterError, match="log_mel"):
            log_mel(wrong.astype(np.float32), 10, mel_filters(4))
