"""A file behind a network: opened at any byte, read in chunks, or in ranges.  Clauses: WL-FETCH-1..6, WL-META-2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from ferrum_ref.errors import NetworkError
from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.weights.settings import Deadline

CHUNK_BYTES: Final = 256 * 1024


class Interruption(Exception):
    """A failure that another attempt may mend; never leaves this room."""


@dataclass(frozen=True, slots=True)
class Body:
    """An answer under way: the chunks of `start : total`.

    `validator` names this version of the content, so that a later request can ask for the rest of the same one.
    `is_delimited`: a cut can be told from the end. `checksum`: the server's own ("sha256" or "md5", hex).
    """

    start: int
    total: int | None
    validator: str | None
    chunks: Iterator[bytes]
    close: Callable[[], None]
    is_delimited: bool = True
    checksum: tuple[str, str] | None = None


@dataclass(slots=True)
class Remote(ABC):
    """One file; `name` may be shown.  Raises FerrumError, or Interruption where trying again makes sense."""

    name: str = field(init=False)

    @abstractmethod
    def open(self, start: int, validator: str | None, deadline: Deadline) -> Body:
        """The content from byte `start` on, if it is still `validator`'s; else all of it.  [WL-FETCH-2]"""

    @abstractmethod
    def open_range(self, start: int, num_bytes: int, deadline: Deadline) -> Body:
        """Up to `num_bytes` from `start`, or everything where the server knows no ranges."""

    @abstractmethod
    def close(self) -> None:
        """Release connections."""


class RangedBytes(ByteSource):
    """A remote file as a ByteSource: fetches what is read, ahead by a block.  [WL-META-2]"""

    _AHEAD_BYTES: Final = 64 * 1024

    def __init__(self, remote: Remote, deadline: Deadline) -> None:
        """Raises NetworkError when the server gives no ranges or no size."""
        self.name = remote.name
        self._remote, self._deadline = remote, deadline
        self._start = 0
        self._block, total = self._fetch(0, self._AHEAD_BYTES)
        self.size = total
        self.num_fetched_bytes = len(self._block)

    def _fill(self, offset: int, out: memoryview) -> int:
        end = self._start + len(self._block)
        if not self._start <= offset <= offset + len(out) <= end:
            wanted = min(max(len(out), self._AHEAD_BYTES), self.size - offset)
            self._block, total = self._fetch(offset, wanted)
            self._start = offset
            self.num_fetched_bytes += len(self._block)
            if total != self.size:
                raise NetworkError(f"read {self.name}: got a size of {total} bytes, expected {self.size} as before")
        begin = offset - self._start
        piece = self._block[begin : begin + len(out)]
        out[: len(piece)] = piece
        return len(piece)

    def _fetch(self, start: int, num_bytes: int) -> tuple[bytes, int]:
        try:
            body = self._remote.open_range(start, num_bytes, self._deadline)
            try:
                if body.total is None or (body.start != start):
                    raise NetworkError(f"read {self.name}: got an answer without a range, expected one")
                pieces, found = [], 0
                while found < num_bytes and (piece := next(body.chunks, b"")):
                    pieces.append(piece[: num_bytes - found])
                    found += len(pieces[-1])
                return b"".join(pieces), body.total
            finally:
                body.close()
        except Interruption as failure:
            self._deadline.remaining_s(self.name)
            raise NetworkError(f"read {self.name}: {failure}") from None
