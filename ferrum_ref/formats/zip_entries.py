"""A zip archive's entries, read without trusting it: no encryption, no odd compression, no size that cannot be.

Clauses: WL-ZIP-1..2 (specs/weights.md).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import FerrumError, ResourceExhaustedError
from ferrum_ref.formats.byte_source import ByteSource, SeekableBytes
from ferrum_ref.formats.complaint import invalid, unsupported

MAGIC: Final = b"PK\x03\x04"
_MAX_DEFLATE_RATIO: Final = 1032  # zlib's own bound: more than that a deflated byte cannot say
_CHUNK_BYTES: Final = 1 << 20
_BROKEN: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    UnicodeError,
    ValueError,
)


class ZipEntries:
    """The archive's entries by name; `reader` names the format in messages.  [WL-ZIP-1]"""

    def __init__(self, source: ByteSource, reader: str) -> None:
        """Raises InvalidFormatError for a broken archive or a name given twice."""
        self._reader, self.source = reader, source
        try:
            self._zip = zipfile.ZipFile(SeekableBytes(source))
        except FerrumError:
            raise
        except _BROKEN as error:
            raise invalid(reader, source.name, "archive", error, "a zip archive") from None
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.filename in self._infos:
                raise invalid(reader, source.name, "entry", info.filename, "each name once")
            self._infos[info.filename] = info

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._infos)

    def num_bytes(self, name: str, *, may_deflate: bool = True) -> int:
        """The entry's size as declared, after checking that it can be true.  [WL-ZIP-2]"""
        info = self._infos.get(name)
        if info is None:
            raise invalid(self._reader, self.source.name, "entry", name, "an entry of the archive")
        if info.flag_bits & 0x1:
            raise unsupported(self._reader, self.source.name, name, "an encrypted entry", "a plain one")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if info.compress_type != zipfile.ZIP_STORED and not (deflated and may_deflate):
            got = f"compression method {info.compress_type}"
            raise unsupported(self._reader, self.source.name, name, got, "stored entries")
        most = info.compress_size * _MAX_DEFLATE_RATIO + _MAX_DEFLATE_RATIO if deflated else info.compress_size
        if info.compress_size > self.source.size or not 0 <= info.file_size <= most:
            got = f"{info.file_size} bytes from {info.compress_size}"
            raise invalid(self._reader, self.source.name, name, got, f"at most {min(most, self.source.size)}")
        return info.file_size

    def read(self, name: str, limit_bytes: int, *, may_deflate: bool = True) -> NDArray[np.uint8]:
        """The entry's bytes; their CRC is checked.  [WL-ZIP-2]

        Raises InvalidFormatError, UnsupportedError; ResourceExhaustedError beyond `limit_bytes`.
        """
        size = self.num_bytes(name, may_deflate=may_deflate)
        if size > limit_bytes:
            raise ResourceExhaustedError(
                f"read {self._reader} {self.source.name}: entry of {size} bytes, expected at most {limit_bytes}; "
                "raise the loader's max_tensor_bytes"
            )
        return self._read(name, size, whole=True)

    def prefix(self, name: str, num_bytes: int) -> bytes:
        """Up to `num_bytes` first bytes of the entry."""
        return self._read(name, min(num_bytes, self.num_bytes(name)), whole=False).tobytes()

    def _read(self, name: str, size: int, whole: bool) -> NDArray[np.uint8]:
        out = np.empty(size, np.uint8)
        view, found = out.data, 0
        try:
            with self._zip.open(self._infos[name]) as file:
                while found < size and (chunk := file.read(min(_CHUNK_BYTES, size - found))):
                    view[found : found + len(chunk)] = chunk
                    found += len(chunk)
                if whole:
                    file.read(1)  # reaching the end makes zipfile compare the CRC
        except FerrumError:
            raise
        except _BROKEN as error:
            raise invalid(self._reader, self.source.name, name, error, "a sound entry") from None
        if found != size:
            raise invalid(self._reader, self.source.name, name, f"{found} bytes", f"the declared {size}")
        return out
