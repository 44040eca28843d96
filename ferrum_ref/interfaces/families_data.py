"""What the model families take and give: pixels, samples, features, segments.

Clauses: FM-DATA-1..4 (specs/families.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.types.record import F32, U32, Record, Usize, check_unsigned

VisualTokens: TypeAlias = npt.NDArray[np.float32]
"""Flat visual features: rows for a decoder, laid end to end."""

AudioTokens: TypeAlias = npt.NDArray[np.float32]
"""Flat audio features: rows for a decoder, laid end to end."""

ImageBuffer: TypeAlias = bytes
"""Raw pixels; FM-IMAGE-1 says in which order."""

PcmSamples: TypeAlias = npt.NDArray[np.float32]
"""Mono PCM, full scale -1 to 1."""

Embedding: TypeAlias = npt.NDArray[np.float32]
"""One vector `[E]`."""


@dataclass(frozen=True, slots=True)
class TranscriptSegment(Record):
    """Text and the seconds in which it is said.  [FM-DATA-1]

    Raises InvalidParameterError unless 0 <= start_sec <= end_sec < inf.
    """

    start_sec: F32
    end_sec: F32
    text: str

    def __post_init__(self) -> None:
        if not 0 <= self.start_sec <= self.end_sec < math.inf:
            raise InvalidParameterError(
                f"TranscriptSegment: from {self.start_sec} s to {self.end_sec} s, expected 0 <= start <= end < inf"
            )


@dataclass(frozen=True, slots=True, eq=False)
class AudioBuffer(Record):
    """Mono sound: `samples` float32 at `sample_rate` Hz.  [FM-DATA-2]

    Raises InvalidParameterError for a rate of 0 or beyond 32 bits, and for samples as `mono_samples` does.
    """

    sample_rate: U32
    samples: PcmSamples

    def __post_init__(self) -> None:
        Record.__post_init__(self)
        if self.sample_rate == 0:
            raise InvalidParameterError("AudioBuffer: sample_rate is 0, expected a rate in Hz, e.g. 22050")
        object.__setattr__(self, "samples", mono_samples(self.samples, "AudioBuffer"))

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True, slots=True, eq=False)
class SpeakerRef(Record):
    """A voice to imitate: sound, and what it says if that is known.  [FM-DATA-3]

    Raises InvalidParameterError for samples as `mono_samples` does.
    """

    ref_audio: PcmSamples
    ref_text: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ref_audio", mono_samples(self.ref_audio, "SpeakerRef"))


@dataclass(frozen=True, slots=True, eq=False)
class EncoderState(Record):
    """An encoder's result: flat float32 in row-major order, and its dims.  [FM-DATA-4]

    Raises BackendError unless `hidden` is flat and has product(shape) elements; InvalidParameterError for a dim that is
    no unsigned integer.
    """

    hidden: npt.NDArray[np.float32]
    shape: list[Usize]

    def __post_init__(self) -> None:
        dims = [check_unsigned(dim, 2**64, "EncoderState", "a dim of shape") for dim in self.shape]
        hidden = np.asarray(self.hidden, dtype=np.float32)
        if hidden.ndim != 1 or hidden.size != math.prod(dims):
            raise ShapeError(
                f"EncoderState: hidden of shape {hidden.shape} for dims {dims}, expected {math.prod(dims)} flat values"
            )
        object.__setattr__(self, "hidden", hidden)
        object.__setattr__(self, "shape", dims)


def mono_samples(samples: Sequence[float] | npt.NDArray[Any], operation: str) -> PcmSamples:
    """The samples as one float32 row, without a copy where possible.  Pure.  [FM-DATA-2]

    Raises InvalidParameterError unless they are one-dimensional and finite.
    """
    row = np.asarray(samples, dtype=np.float32)
    if row.ndim != 1:
        raise InvalidParameterError(f"{operation}: samples of shape {row.shape}, expected one row: mix down to mono")
    finite = np.isfinite(row)
    if not finite.all():
        index = int(finite.argmin())
        raise InvalidParameterError(f"{operation}: sample {index} is {row[index]}, expected finite numbers")
    return row
