"""WAV files, against Python's own wave module and scipy's reader."""

from __future__ import annotations

import contextlib
import io
import struct
import wave
from typing import Any

import numpy as np
import pytest
import scipy.io.wavfile
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, UnsupportedError
from ferrum_ref.formats.wav import wav_bytes, wav_from_bytes


def pcm_file(channels: int, width: int, rate: int, data: bytes) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return out.getvalue()


def chunk(name: bytes, data: bytes, claimed: int | None = None) -> bytes:
    return name + struct.pack("<I", len(data) if claimed is None else claimed) + data + b"\0" * (len(data) % 2)


def form(tag: int = 1, channels: int = 1, rate: int = 8000, bits: int = 16, frame: int | None = None) -> bytes:
    width = channels * bits // 8 if frame is None else frame
    return struct.pack("<HHIIHH", tag, channels, rate, rate * width & 0xFFFFFFFF, width, bits)


def riff(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.clause("FM-WAV-1", "FM-WAV-2")
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_whole_numbers(width: int) -> None:
    data = np.random.default_rng(width).integers(0, 256, 60 * width).astype(np.uint8).tobytes()
    found = wav_from_bytes(pcm_file(2, width, 22050, data))
    values = [
        int.from_bytes(data[at : at + width], "little", signed=width > 1) - (128 if width == 1 else 0)
        for at in range(0, len(data), width)
    ]
    expected = (np.array(values, np.float64) / 2.0 ** (8 * width - 1)).astype(np.float32).reshape(-1, 2)
    assert found.sample_rate == 22050
    np.testing.assert_array_equal(found.frames, expected)


@pytest.mark.clause("FM-WAV-1", "FM-WAV-2")
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats(kind: Any) -> None:
    samples = np.random.default_rng(0).standard_normal((50, 3)).astype(kind)
    out = io.BytesIO()
    scipy.io.wavfile.write(out, 44100, samples)
    found = wav_from_bytes(out.getvalue())
    assert found.sample_rate == 44100
    np.testing.assert_array_equal(found.frames, samples.astype(np.float32))


@pytest.mark.clause("FM-WAV-1")
def test_layouts() -> None:
    data = struct.pack("<3h", 1, -2, 3)
    plain = riff(chunk(b"fmt ", form()), chunk(b"data", data))
    expected = wav_from_bytes(plain).frames
    assert expected.reshape(-1).tolist() == [1 / 32768, -2 / 32768, 3 / 32768]
    tail = struct.pack("<HHI", 22, 16, 4) + struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    for content in (
        riff(chunk(b"LIST", b"odd"), chunk(b"fmt ", form()), chunk(b"fact", b"1234"), chunk(b"data", data)),
        riff(chunk(b"fmt ", form(0xFFFE) + tail), chunk(b"data", data)),
        riff(chunk(b"fmt ", form()), chunk(b"data", data, 0)),
        riff(chunk(b"fmt ", form()), chunk(b"data", data, 2**32 - 1)),
        riff(chunk(b"fmt ", form()), chunk(b"data", data + b"\1")),
    ):
        np.testing.assert_array_equal(wav_from_bytes(content).frames, expected)
    assert wav_from_bytes(riff(chunk(b"fmt ", form()), chunk(b"data", b""))).frames.shape == (0, 1)


@pytest.mark.clause("FM-WAV-3")
def test_channels_are_mixed() -> None:
    data = struct.pack("<6h", 100, 300, -32768, -32768, 7, 8)
    found = wav_from_bytes(riff(chunk(b"fmt ", form(channels=2)), chunk(b"data", data))).mono()
    assert (found * 32768).tolist() == [200, -32768, 7.5]
    assert found.dtype == np.float32


BROKEN = {
    "nothing": (b"", InvalidFormatError, "RIFF"),
    "text": (b"# a heading and more", InvalidFormatError, "convert the sound"),
    "big-endian": (b"RIFX" + riff()[4:], InvalidFormatError, "RIFF"),
    "no data": (riff(chunk(b"fmt ", form())), InvalidFormatError, "no samples"),
    "data first": (riff(chunk(b"data", b"ab"), chunk(b"fmt ", form())), InvalidFormatError, "fmt chunk first"),
    "cut": (riff(chunk(b"fmt ", form()), chunk(b"data", b"ab", 100)), InvalidFormatError, "2 bytes, expected the 100"),
    "chunk": (riff(chunk(b"LIST", b"ab", 99)), InvalidFormatError, "the 99 that it claims"),
    "short fmt": (riff(chunk(b"fmt ", form()[:14])), InvalidFormatError, "14 bytes"),
    "mu-law": (riff(chunk(b"fmt ", form(7, bits=8))), UnsupportedError, "tag 7 with 8 bits"),
    "12 bits": (riff(chunk(b"fmt ", form(bits=12))), UnsupportedError, "12 bits"),
    "other sub-format": (riff(chunk(b"fmt ", form(0xFFFE) + b"\0" * 24)), UnsupportedError, "tag 65534"),
    "channels": (riff(chunk(b"fmt ", form(channels=65))), InvalidFormatError, "65 channels"),
    "rate": (riff(chunk(b"fmt ", form(rate=0))), InvalidFormatError, "0 Hz"),
    "frame": (riff(chunk(b"fmt ", form(frame=3))), InvalidFormatError, "3 bytes a frame"),
    "nan": (
        riff(chunk(b"fmt ", form(3, bits=32)), chunk(b"data", struct.pack("<f", np.nan))),
        InvalidFormatError,
        "finite",
    ),
    "huge": (
        riff(chunk(b"fmt ", form(3, bits=64)), chunk(b"data", struct.pack("<d", 1e300))),
        InvalidFormatError,
        "finite",
    ),
}


@pytest.mark.clause("FM-WAV-3", "FM-WAV-1")
@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_refused(name: str) -> None:
    content, error, text = BROKEN[name]
    with pytest.raises(error, match=text) as caught:
        wav_from_bytes(content, "x.wav")
    assert "x.wav" in str(caught.value)


@pytest.mark.clause("FM-WAV-3")
@settings(max_examples=150)
@given(places=st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=5), end=st.integers(0, 80))
def test_damaged_files_give_named_errors(places: list[tuple[int, int]], end: int) -> None:
    content = bytearray(riff(chunk(b"LIST", b"abcd"), chunk(b"fmt ", form()), chunk(b"data", bytes(range(24)))))
    for place, value in places:
        content[place % len(content)] = value
    with contextlib.suppress(InvalidFormatError, UnsupportedError):
        assert np.isfinite(wav_from_bytes(bytes(content[:end])).mono()).all()


@pytest.mark.clause("FM-WAV-4")
@given(st.lists(st.floats(-2, 2, width=32), max_size=40), st.integers(1, 2**31 - 1))
def test_written_files(samples: list[float], rate: int) -> None:
    row = np.array(samples, np.float32)
    content = wav_bytes(row, rate)
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getnframes()) == (1, 2, len(row))
        assert file.getframerate() == rate
        stored = np.frombuffer(file.readframes(len(row)), "<i2")
    expected = [round(max(-1.0, min(1.0, float(each))) * 32767) for each in row]
    assert stored.tolist() == expected
    again = wav_from_bytes(content).mono()
    assert np.abs(again - np.clip(row, -1, 1)).max(initial=0) <= 1.5 * 2**-15


@pytest.mark.clause("FM-WAV-4")
def test_samples_that_are_not_written() -> None:
    for wrong in (np.array([np.nan]), np.array([np.inf]), np.zeros((2, 2))):
        with pytest.raises(InvalidParameterError, match="one finite row"):
            wav_bytes(wrong.astype(np.float32), 16000)
    for rate in (0, 2**31):
        with pytest.raises(InvalidParameterError, match=f"rate of {rate} Hz"):
            wav_bytes(np.zeros(1, np.float32), rate)
