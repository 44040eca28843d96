"""WAV files: RIFF chunks around plain samples.

PCM of 8 bits (unsigned), 16, 24 and 32 bits, and floats of 32 and 64 bits, little-endian, frame by frame; the
"extensible" header is read for the same. Full scale is -1 to 1: an n-bit sample counts as value / 2**(n-1).
Clauses: FM-WAV-1..4 (specs/audio.md).  Source: Microsoft, "Multiple Channel Audio Data and WAVE Files".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.formats.byte_source import ByteSource, MemoryBytes
from ferrum_ref.formats.complaint import invalid, unsupported

_PCM: Final = 1
_FLOAT: Final = 3
_EXTENSIBLE: Final = 0xFFFE
_EXTENSIBLE_TAIL: Final = bytes.fromhex("000000001000800000aa00389b71")  # of the sub-format's GUID, behind the tag
_MAX_CHANNELS: Final = 64
_UNKNOWN_BYTES: Final = (0, 2**32 - 1)  # what a program that writes to a pipe puts down for a length


@dataclass(frozen=True, slots=True)
class WavSound:
    """`frames` `[num_frames, num_channels]` float32 at `sample_rate` Hz."""

    sample_rate: int
    frames: NDArray[np.float32]

    def mono(self) -> NDArray[np.float32]:
        """The channels' mean, rounded once.  [FM-WAV-3]"""
        if self.frames.shape[1] == 1:
            return self.frames[:, 0]
        return np.asarray(self.frames.mean(axis=1, dtype=np.float64), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Format:
    tag: int
    num_channels: int
    sample_rate: int
    num_bits: int


def read_wav(source: ByteSource) -> WavSound:
    """The sound of a WAV file.  Pure.  [FM-WAV-1..3]

    Raises InvalidFormatError (no WAV file, a chunk that lies, samples not finite), UnsupportedError (encoding).
    """
    head = source.read(0, min(12, source.size))
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise invalid("WAV", source.name, "first 12 bytes", head, "RIFF....WAVE; convert the sound to a WAV file")
    found: _Format | None = None
    position = 12
    while position + 8 <= source.size:
        name, num_bytes = source.read(position, 4), int.from_bytes(source.read(position + 4, 4), "little")
        position += 8
        left = source.size - position
        if name == b"data":
            if found is None:
                raise invalid("WAV", source.name, "data", "samples before the format", "a fmt chunk first")
            if num_bytes > left and num_bytes not in _UNKNOWN_BYTES:
                raise invalid("WAV", source.name, "data", f"{left} bytes", f"the {num_bytes} that the chunk claims")
            return _sound(source, found, position, left if num_bytes in _UNKNOWN_BYTES else num_bytes)
        if num_bytes > left:
            raise invalid("WAV", source.name, f"chunk {name!r}", f"{left} bytes", f"the {num_bytes} that it claims")
        if name == b"fmt ":
            found = _format(source, position, num_bytes)
        position += num_bytes + num_bytes % 2
    raise invalid("WAV", source.name, "file", "no samples", "a data chunk")


def _format(source: ByteSource, position: int, num_bytes: int) -> _Format:
    if num_bytes < 16:
        raise invalid("WAV", source.name, "fmt", f"{num_bytes} bytes", "at least 16")
    data = source.read(position, min(num_bytes, 40))
    tag, channels, rate, frame_bytes, bits = (
        int.from_bytes(data[start:stop], "little") for start, stop in ((0, 2), (2, 4), (4, 8), (12, 14), (14, 16))
    )
    if tag == _EXTENSIBLE and len(data) == 40 and data[26:] == _EXTENSIBLE_TAIL:
        tag = int.from_bytes(data[24:26], "little")
    if (tag, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
        expected = "PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64 bits; convert the file"
        raise unsupported("WAV", source.name, "encoding", f"tag {tag} with {bits} bits", expected)
    if not 1 <= channels <= _MAX_CHANNELS or not rate:
        got = f"{channels} channels at {rate} Hz"
        raise invalid("WAV", source.name, "fmt", got, f"1 to {_MAX_CHANNELS} channels and a rate above 0")
    if frame_bytes != channels * bits // 8:
        raise invalid("WAV", source.name, "fmt", f"{frame_bytes} bytes a frame", f"{channels * bits // 8}")
    return _Format(tag, channels, rate, bits)


def _sound(source: ByteSource, found: _Format, position: int, num_bytes: int) -> WavSound:
    frame_bytes = found.num_channels * found.num_bits // 8
    raw = source.array(position, num_bytes - num_bytes % frame_bytes)  # a torn last frame is left out
    samples = _samples(raw, found).reshape(-1, found.num_channels)
    if not np.isfinite(samples).all():
        raise invalid("WAV", source.name, "data", "samples that are not finite", "finite numbers")
    return WavSound(found.sample_rate, samples)


def _samples(raw: NDArray[np.uint8], found: _Format) -> NDArray[np.float32]:
    if found.tag == _FLOAT:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            return np.asarray(raw.view(f"<f{found.num_bits // 8}"), dtype=np.float32)
    if found.num_bits == 8:
        return (raw.astype(np.float32) - np.float32(128)) / np.float32(128)
    if found.num_bits == 24:
        wide = np.zeros((raw.size // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        return (wide.reshape(-1).view("<i4") / 2.0**31).astype(np.float32)
    return (raw.view(f"<i{found.num_bits // 8}") / 2.0 ** (found.num_bits - 1)).astype(np.float32)


def wav_bytes(samples: NDArray[np.float32], sample_rate: int) -> bytes:
    """A WAV file of one channel, 16 bits: each sample clamped to [-1, 1], times 32767, rounded.  Pure.  [FM-WAV-4]

    Raises InvalidParameterError unless the samples are one finite row, the file stays below 4 GiB, and the rate below
    2**31 Hz.
    """
    if not 1 <= sample_rate < 2**31:
        raise InvalidParameterError(f"write WAV: rate of {sample_rate} Hz, expected 1 to {2**31 - 1}")
    row = np.asarray(samples, dtype=np.float32)
    if row.ndim != 1 or not np.isfinite(row).all() or row.size >= 2**31 - 64:
        raise InvalidParameterError(f"write WAV: samples of shape {row.shape}, expected one finite row below 4 GiB")
    data = np.rint(np.clip(row, -1, 1).astype(np.float64) * 32767).astype("<i2").tobytes()
    numbers = ((16, 4), (_PCM, 2), (1, 2), (sample_rate, 4), (2 * sample_rate, 4), (2, 2), (16, 2))
    form = b"".join(number.to_bytes(width, "little") for number, width in numbers)
    body = b"WAVEfmt " + form + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def wav_from_bytes(data: bytes, name: str = "memory") -> WavSound:
    """As `read_wav`, of bytes in hand."""
    return read_wav(MemoryBytes(data, name))
