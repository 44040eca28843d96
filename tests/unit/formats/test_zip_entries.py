"""A zip archive's entries: sizes that can be, checksums, no encryption, no bombs."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from ferrum_ref.errors import FerrumError, InvalidFormatError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.formats.byte_source import MemoryBytes
from ferrum_ref.formats.zip_entries import ZipEntries

PAYLOAD = bytes(range(200)) * 30


def archive(method: int = zipfile.ZIP_STORED, **entries: bytes) -> bytearray:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return bytearray(target.getvalue())


def entries(content: bytes) -> ZipEntries:
    return ZipEntries(MemoryBytes(bytes(content), "a.zip"), "npz")


@pytest.mark.clause("WL-ZIP-1")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads(method: int) -> None:
    found = entries(archive(method, a=PAYLOAD, b=b""))
    assert found.names == ("a", "b")
    assert (found.num_bytes("a"), found.num_bytes("b")) == (len(PAYLOAD), 0)
    assert found.read("a", 10**6).tobytes() == PAYLOAD
    assert found.prefix("a", 10) == PAYLOAD[:10]
    with pytest.raises(InvalidFormatError):
        found.read("absent", 10)


@pytest.mark.clause("WL-ZIP-1")
def test_damage() -> None:
    content = archive(a=PAYLOAD)
    content[100] ^= 1
    with pytest.raises(InvalidFormatError, match="CRC"):
        entries(content).read("a", 10**6)
    with pytest.raises(InvalidFormatError, match="expected a zip archive"):
        entries(content[:-30])
    twice = archive(a=b"1", b=b"2")
    with pytest.raises(InvalidFormatError, match="each name once"):
        entries(twice.replace(b"b", b"a"))


def with_sizes(content: bytearray, compressed: int, size: int) -> bytearray:
    """The central directory's sizes of the first entry replaced."""
    place = content.index(b"PK\x01\x02")
    content[place + 20 : place + 28] = struct.pack("<II", compressed, size)
    return content


@pytest.mark.clause("WL-ZIP-2")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_sizes_that_cannot_be(method: int) -> None:
    """Checked before anything is allocated: one deflated byte says at most 1032."""
    for compressed, size in ((6000, 2**31), (2**31, 2**31), (10, 20_000)):
        with pytest.raises(InvalidFormatError):
            entries(with_sizes(archive(method, a=PAYLOAD), compressed, size)).read("a", 2**40)


@pytest.mark.clause("WL-ZIP-2")
def test_limits_and_methods() -> None:
    bomb = archive(zipfile.ZIP_DEFLATED, a=bytes(10**6))
    assert len(bomb) < 2000
    with pytest.raises(ResourceExhaustedError, match="1000000 bytes, expected at most 1000"):
        entries(bomb).read("a", 1000)
    with pytest.raises(UnsupportedError, match="method 8"):
        entries(bomb).read("a", 10**7, may_deflate=False)
    with pytest.raises(UnsupportedError, match="method 12"):
        entries(archive(zipfile.ZIP_BZIP2, a=PAYLOAD)).read("a", 10**6)
    encrypted = archive(a=PAYLOAD)
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UnsupportedError, match="encrypted"):
        entries(encrypted).read("a", 10**6)
    with pytest.raises(FerrumError):
        entries(b"")
