"""Reading GGUF's scalars, strings and arrays off a byte buffer, never past its end.

Every count in the file is checked against the bytes that are left before anything is allocated, so a lying header
costs an error message and not memory.  Clauses: MD-GGUF-2, MD-GGUF-3 (specs/model_files.md).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidFormatError

GgufValue = int | float | bool | str | tuple[Any, ...] | NDArray[Any]

STRING: Final = 8
ARRAY: Final = 9
_BOOL: Final = 7
_SCALARS: Final[Mapping[int, str]] = MappingProxyType(
    {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"}
)
_LENGTH: Final = struct.Struct("<Q")
_MAX_NESTING: Final = 4
_MAX_QUOTED_CHARACTERS: Final = 100


class Cursor:
    """A position in the file's bytes; every read names the field it is for."""

    def __init__(self, data: mmap.mmap | bytes, path: str) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.offset = 0

    def fail(self, field: str, got: object, expected: object) -> NoReturn:
        """Raise the reader's one kind of error, on one line whatever the file contains."""
        what, found = _printable(field), _printable(str(got))
        raise InvalidFormatError(f"read GGUF {self.path}: {what}: got {found}, expected {expected}; get the file again")

    def take(self, num_bytes: int, field: str) -> bytes:
        """The next bytes, copied; the cursor moves behind them."""
        self.require(1, num_bytes, field)
        start = self.offset
        self.offset += num_bytes
        return bytes(self.data[start : self.offset])

    def require(self, count: int, item_bytes: int, field: str) -> None:
        """At least `count` items of `item_bytes` must still fit into the file."""
        if count * item_bytes > self.size - self.offset:
            self.fail(field, f"{count} x {item_bytes} bytes", f"at most the {self.size - self.offset} left in the file")

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.take(8, field), "little")

    def string(self, field: str) -> str:
        return self.strings(1, field)[0]

    def strings(self, count: int, field: str) -> list[str]:
        """`count` strings in a row: a length (u64) and that many bytes of UTF-8 each."""
        self.require(count, 8, field)
        data, size, offset, texts = self.data, self.size, self.offset, []
        for index in range(count):
            if size - offset < 8:
                self.fail(f"{field}[{index}]", f"{size - offset} bytes", "a string length of 8 bytes")
            (length,) = _LENGTH.unpack_from(data, offset)
            offset += 8
            if length > size - offset:
                self.fail(f"{field}[{index}]", f"a string of {length} bytes", f"at most the {size - offset} left")
            try:
                texts.append(bytes(data[offset : offset + length]).decode())
            except UnicodeDecodeError as error:
                self.fail(f"{field}[{index}]", f"bytes that are not UTF-8 ({error.reason})", "UTF-8 text")
            offset += length
        self.offset = offset
        return texts

    def value(self, type_code: int, field: str, depth: int = 0) -> GgufValue:
        """A value of the given type: a Python scalar, a string, a tuple of strings or arrays, or a numeric array."""
        if type_code == STRING:
            return self.string(field)
        if type_code == ARRAY:
            return self._array(field, depth)
        found = self._numbers(type_code, 1, field)[0].item()
        return found if isinstance(found, (int, float, bool)) else str(found)

    def _array(self, field: str, depth: int) -> GgufValue:
        if depth >= _MAX_NESTING:
            self.fail(field, f"arrays nested deeper than {_MAX_NESTING}", f"at most {_MAX_NESTING}")
        item_type, count = self.u32(f"{field}: item type"), self.u64(f"{field}: length")
        if item_type == STRING:
            return tuple(self.strings(count, field))
        if item_type == ARRAY:
            self.require(count, 12, field)
            return tuple(self._array(f"{field}[{index}]", depth + 1) for index in range(count))
        return self._numbers(item_type, count, field)

    def _numbers(self, type_code: int, count: int, field: str) -> NDArray[Any]:
        if type_code not in _SCALARS:
            self.fail(f"{field}: value type", type_code, "0 to 12")
        dtype = np.dtype(_SCALARS[type_code])
        self.require(count, dtype.itemsize, field)
        raw = self.take(count * dtype.itemsize, field)
        if type_code == _BOOL and raw.strip(b"\x00\x01"):
            self.fail(field, "a boolean byte other than 0 and 1", "0 or 1")
        return np.frombuffer(raw, dtype)


def _printable(text: str) -> str:
    """A file's text as it may stand in an error message: short, on one line."""
    short = text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "..."
    return short if short.isprintable() else ascii(short)
