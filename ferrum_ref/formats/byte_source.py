"""Bytes that can be read at any place, wherever they lie: the one thing a container reader needs.

Reading never goes past the end, and nothing is allocated before the wanted range is known to lie inside.
Clauses: WL-BYTES-1..2 (specs/weights.md).
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError


class ByteSource(ABC):
    """Random access to `size` bytes; `name` stands in messages and holds no secret.  Safe for concurrent reads."""

    name: str
    size: int

    @abstractmethod
    def _fill(self, offset: int, out: memoryview) -> int:
        """Fill `out` from `offset`; returns how many bytes were there."""

    def close(self) -> None:
        """Release what is held; the default holds nothing."""
        return

    def array(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """The bytes `offset : offset + num_bytes` as a fresh array.  [WL-BYTES-1]

        Raises InvalidFormatError when the range does not lie inside, FerrumIOError when the file has shrunk since.
        """
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size:
            raise InvalidFormatError(
                f"read {self.name}: got bytes {offset} to {offset + num_bytes} asked for, "
                f"expected an end within the {self.size} bytes there are; get the file again"
            )
        out = np.empty(num_bytes, np.uint8)
        found = self._fill(offset, out.data) if num_bytes else 0
        if found != num_bytes:
            raise FerrumIOError(f"read {self.name}: got {found} bytes at {offset}, expected {num_bytes}")
        return out

    def read(self, offset: int, num_bytes: int) -> bytes:
        """As `array`, as bytes."""
        return self.array(offset, num_bytes).tobytes()


class MemoryBytes(ByteSource):
    """Bytes in hand."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        self.name = name
        self.size = len(data)
        self.data = data

    def _fill(self, offset: int, out: memoryview) -> int:
        out[:] = memoryview(self.data)[offset : offset + len(out)]
        return len(out)


class FileBytes(ByteSource):
    """A regular file, held open: replacing it later does not disturb the readers.  [WL-BYTES-2]

    Closed by `close` or with the last reference, whichever comes first.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Raises NotFoundError (no such file), FerrumIOError (not a regular file, unreadable)."""
        self.path = path
        self.name = name if name is not None else str(path)
        self._lock = threading.Lock()
        try:
            if path.exists() and not path.is_file():
                raise FerrumIOError(f"read {self.name}: got a directory or device, expected a regular file")
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise NotFoundError(f"read {self.name}: no such file") from None
        except (OSError, ValueError) as error:
            raise FerrumIOError(f"read {self.name}: {_reason(error)}") from None
        self._closer = weakref.finalize(self, os.close, descriptor)
        self._file = io.FileIO(descriptor, "rb", closefd=False)
        self.size = self._file.seek(0, io.SEEK_END)

    def _fill(self, offset: int, out: memoryview) -> int:
        found = 0
        try:
            with self._lock:
                if not self._closer.alive:
                    raise FerrumIOError(f"read {self.name}: the file was closed")
                self._file.seek(offset)
                while found < len(out) and (step := self._file.readinto(out[found:])):
                    found += step
        except OSError as error:
            raise FerrumIOError(f"read {self.name}: {_reason(error)}") from None
        return found

    def close(self) -> None:
        with self._lock:
            self._closer()


class SeekableBytes(io.RawIOBase):
    """A ByteSource as the binary file that a library wants."""

    def __init__(self, source: ByteSource) -> None:
        super().__init__()
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise OSError("seek before the start of the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._source.size - self._position))
        if count:
            view[:count] = self._source.array(self._position, count).data
        self._position += count
        return count


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
