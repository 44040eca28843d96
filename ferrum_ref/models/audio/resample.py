"""Sound at another rate.  Clause: FM-RATE-1 (specs/audio.md)."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.families_data import PcmSamples, mono_samples

_HALF_PERIODS: Final = 10  # of the slower rate, on either side
_KAISER_BETA: Final = 5.0
_BLOCK: Final = 1 << 14  # outputs taken at a time
_MAX_RATE: Final = 2**20  # Hz; with a filter of 20 samples per unit of the ratio this bounds the memory


def resample(pcm: PcmSamples, from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """The same sound, ceil(n * to / from) samples: y[k] = sum_j x[j] h(k * down - j * up)  [FM-RATE-1]

    up / down is to / from in lowest terms; h the sinc that passes up to the lower rate's half, under a Kaiser window
    (beta 5, 10 periods on either side), normalised to sum up. In float64, rounded once; an equal rate changes nothing.
    Pure. Raises InvalidParameterError (a rate outside [1, 2**20] Hz, samples not finite, not one row).
    Source: Oppenheim & Schafer, "Discrete-Time Signal Processing", 4.6; scipy.signal.resample_poly gives the same.
    """
    samples = mono_samples(pcm, "resample")
    for rate in (from_rate, to_rate):
        if not 1 <= rate <= _MAX_RATE:
            raise InvalidParameterError(f"resample: rate of {rate} Hz, expected 1 to {_MAX_RATE}")
    common = math.gcd(from_rate, to_rate)
    up, down = to_rate // common, from_rate // common
    if up == down or not samples.size:
        return samples
    taps = _low_pass(up, down)
    half = len(taps) // 2
    out = np.empty(-(-samples.size * up // down), dtype=np.float64)
    padded = np.pad(samples.astype(np.float64), half // up + 2)
    for phase in range(min(up, len(out))):  # every output with the same fractional place shares one set of taps
        first = phase * down % up  # place, in steps of 1 / up, of these outputs behind the last input before them
        mine = taps[(first + half) % up :: up]
        latest = (first + half) // up  # the first of these taps meets the input that far ahead of the last one before
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(mine))
        ahead = latest - len(mine) + 1 + half // up + 2
        for start in range(phase, len(out), up * _BLOCK):
            outputs = np.arange(start, min(len(out), start + up * _BLOCK), up)
            out[outputs] = windows[outputs * down // up + ahead] @ mine[::-1]
    return out.astype(np.float32)


def _low_pass(up: int, down: int) -> NDArray[np.float64]:
    """h at steps of 1 / up of an input sample, 2 * 10 * max(up, down) + 1 taps, summing to `up`."""
    slower = max(up, down)
    steps = np.arange(-_HALF_PERIODS * slower, _HALF_PERIODS * slower + 1)
    taps = np.sinc(steps / slower) * np.kaiser(len(steps), _KAISER_BETA)
    return np.asarray(taps * (up / taps.sum()))
