"""Other rates, against scipy.signal.resample_poly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.models.audio.resample import resample

USUAL = st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000])
RATES = st.one_of(st.tuples(USUAL, USUAL), st.tuples(st.integers(1, 9), st.integers(1, 9)))


@pytest.mark.clause("FM-RATE-1")
@given(RATES, st.integers(0, 600), st.integers(0, 99))
def test_as_scipy(rates: tuple[int, int], count: int, seed: int) -> None:
    from_rate, to_rate = rates
    samples = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    found = resample(samples, from_rate, to_rate)
    assert found.dtype == np.float32
    assert len(found) == -(-count * to_rate // from_rate)
    if from_rate == to_rate or not count:
        np.testing.assert_array_equal(found, samples)
        return
    common = math.gcd(from_rate, to_rate)
    expected = scipy.signal.resample_poly(samples.astype(np.float64), to_rate // common, from_rate // common)
    # one rounding to float32, and float64's in sums whose terms are at most a few times the result's scale
    bound = 2**-24 * np.abs(expected) + 2**-40 * np.abs(samples).max()
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.clause("FM-RATE-1")
def test_blocks_of_outputs_meet() -> None:
    """Longer than one block of outputs."""
    samples = np.random.default_rng(0).standard_normal(60_000).astype(np.float32)
    expected = scipy.signal.resample_poly(samples.astype(np.float64), 1, 3)
    assert np.abs(resample(samples, 48000, 16000) - expected).max() <= 2**-23


@pytest.mark.clause("FM-RATE-1")
def test_a_tone_keeps_its_pitch() -> None:
    seconds = np.arange(22050) / 22050
    found = resample(np.sin(2 * np.pi * 1000 * seconds).astype(np.float32), 22050, 16000)
    expected = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(found - expected)[500:-500].max() < 0.01  # the filter's ripple


@pytest.mark.clause("FM-RATE-1")
def test_what_is_refused() -> None:
    for rates in ((0, 1), (1, 0), (-5, 5), (2**20 + 1, 16000)):
        with pytest.raises(InvalidParameterError, match="rate of"):
            resample(np.zeros(4, np.float32), *rates)
    for wrong in (np.array([np.nan]), np.zeros((2, 2))):
        with pytest.raises(InvalidParameterError, match="resample: sample"):
            resample(wrong.astype(np.float32), 1, 2)
