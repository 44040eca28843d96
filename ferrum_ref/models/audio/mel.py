"""Whisper's picture of a sound: the logarithm of its energy in bands that follow hearing.

    frames of 400 samples every 160 at 16 kHz, reflected at both ends, under a periodic Hann window
    S = |FFT|**2 of all frames but the last;   L = log10(max(1e-10, filters @ S));   x = (max(L, max(L) - 8) + 4) / 4

Computed in float64, rounded once.  Clauses: FM-MEL-1..4 (specs/audio.md).
Source: Radford et al. 2022, section 2.2; Slaney 1998 (Auditory Toolbox) for the scale and the area norm.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.families_data import PcmSamples, mono_samples

SAMPLE_RATE: Final = 16_000  # Hz
WINDOW_SAMPLES: Final = 400
HOP_SAMPLES: Final = 160
_HIGHEST_HZ: Final = 8_000.0
_LINEAR_HZ_PER_MEL: Final = 200 / 3
_CORNER_HZ: Final = 1_000.0  # linear below, logarithmic above
_LOG_STEP: Final = np.log(6.4) / 27
_FLOOR: Final = 1e-10
_RANGE_DECADES: Final = 8.0


def mel_from_hz(hz: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Slaney's scale: 3 f / 200 below 1 kHz, 15 + 27 ln(f / 1000) / ln 6.4 above.  Pure.  [FM-MEL-1]"""
    frequency = np.asarray(hz, dtype=np.float64)
    high = np.log(np.maximum(frequency, _CORNER_HZ) / _CORNER_HZ) / _LOG_STEP
    return np.where(frequency < _CORNER_HZ, frequency / _LINEAR_HZ_PER_MEL, _CORNER_HZ / _LINEAR_HZ_PER_MEL + high)


def hz_from_mel(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `mel_from_hz`.  Pure.  [FM-MEL-1]"""
    corner = _CORNER_HZ / _LINEAR_HZ_PER_MEL
    return np.where(
        mel < corner, mel * _LINEAR_HZ_PER_MEL, _CORNER_HZ * np.exp(_LOG_STEP * np.maximum(mel - corner, 0))
    )


def mel_filters(num_bands: int) -> NDArray[np.float64]:
    """Triangles of area 1 (in Hz) whose corners are equally spaced in mel from 0 to 8 kHz.  Pure.  [FM-MEL-2]

    `[num_bands, 201]`: row b rises from corner b to b + 1 and falls to b + 2. Raises InvalidParameterError below 1.
    """
    if num_bands < 1:
        raise InvalidParameterError(f"mel_filters: num_bands is {num_bands}, expected at least 1 (Whisper: 80 or 128)")
    corners = hz_from_mel(np.linspace(0.0, float(mel_from_hz(_HIGHEST_HZ)), num_bands + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW_SAMPLES // 2 + 1)
    widths = np.diff(corners)
    rising = (bins - corners[:-2, None]) / widths[:-1, None]
    falling = (corners[2:, None] - bins) / widths[1:, None]
    area = 2.0 / (corners[2:] - corners[:-2])
    return np.asarray(np.maximum(0, np.minimum(rising, falling)) * area[:, None])


def log_mel(pcm: PcmSamples, num_frames: int, filters: NDArray[np.float64]) -> NDArray[np.float32]:
    """The log-mel picture `[bands, num_frames]` of at most num_frames * 160 samples, zeros behind them.  [FM-MEL-3..4]

    Pure. Raises InvalidParameterError (samples not finite, not one row), ResourceExhaustedError (more samples).
    """
    samples = mono_samples(pcm, "log_mel").astype(np.float64)
    room = num_frames * HOP_SAMPLES
    if len(samples) > room:
        raise ResourceExhaustedError(
            f"log_mel: {len(samples)} samples, expected at most {room}: {room / SAMPLE_RATE:g} s at {SAMPLE_RATE} Hz"
        )
    half = WINDOW_SAMPLES // 2
    whole = np.pad(np.pad(samples, (0, room - len(samples))), half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(whole, WINDOW_SAMPLES)[::HOP_SAMPLES][:num_frames]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)
    spectrum = np.fft.rfft(frames * window, axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    decades = np.log10(np.maximum(filters @ power.T, _FLOOR))
    return np.asarray((np.maximum(decades, decades.max() - _RANGE_DECADES) + 4) / 4, dtype=np.float32)
