"""Bytes at any place: exactly what is asked for, or an error; a file replaced under a reader does not disturb it."""

from __future__ import annotations

import gc
import io
import os
from pathlib import Path

import numpy as np
import pytest

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.byte_source import ByteSource, FileBytes, MemoryBytes, SeekableBytes

DATA = bytes(range(256)) * 5


@pytest.fixture(params=["file", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ByteSource:
    if request.param == "memory":
        return MemoryBytes(DATA)
    (tmp_path / "x").write_bytes(DATA)
    return FileBytes(tmp_path / "x")


@pytest.mark.clause("WL-BYTES-1")
def test_ranges(source: ByteSource) -> None:
    assert source.size == len(DATA)
    for start, count in ((0, 0), (0, 7), (100, 900), (1279, 1), (1280, 0)):
        assert source.read(start, count) == DATA[start : start + count]
        assert source.array(start, count).tolist() == list(DATA[start : start + count])
    for start, count in ((0, 1281), (1280, 1), (-1, 2), (5, -1), (2**70, 1), (0, 2**62)):
        with pytest.raises(InvalidFormatError, match="within the 1280 bytes"):
            source.array(start, count)
    fresh = source.array(0, 4)
    fresh[:] = 9
    assert source.read(0, 2) == DATA[:2]
    source.close()


@pytest.mark.clause("WL-BYTES-1")
def test_as_a_file(source: ByteSource) -> None:
    file = io.BufferedReader(SeekableBytes(source))
    assert file.read() == DATA
    file.seek(-5, io.SEEK_END)
    assert (file.read(100), file.read(1)) == (DATA[-5:], b"")
    file.seek(10)
    assert (file.seek(3, io.SEEK_CUR), file.read(2)) == (13, DATA[13:15])
    with pytest.raises(OSError, match="before the start"):
        SeekableBytes(source).seek(-1)


@pytest.mark.clause("WL-BYTES-2")
def test_a_replaced_file_keeps_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(DATA)
    file = FileBytes(path)
    (tmp_path / "y").write_bytes(b"other")
    os.replace(tmp_path / "y", path)
    assert file.read(0, 1280) == DATA
    file.close()
    with pytest.raises(FerrumIOError, match="closed"):
        file.read(0, 1)


@pytest.mark.clause("WL-BYTES-2")
def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    """A memory map would end the process with SIGBUS here."""
    path = tmp_path / "x"
    path.write_bytes(DATA)
    file = FileBytes(path)
    os.truncate(path, 100)
    with pytest.raises(FerrumIOError, match="got 0 bytes at 100, expected 50"):
        file.array(100, 50)


@pytest.mark.clause("WL-BYTES-2")
def test_the_last_reference_closes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    before = len(os.listdir("/proc/self/fd"))
    files = [FileBytes(tmp_path / "x") for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del files
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.clause("WL-BYTES-2")
def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        FileBytes(tmp_path / "absent")
    for path in (tmp_path, Path("/dev/zero"), Path("a\x00b"), Path("x" * 5000)):
        with pytest.raises(FerrumIOError):
            FileBytes(path)
    assert np.asarray(MemoryBytes(b"").array(0, 0)).shape == (0,)
