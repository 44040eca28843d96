"""CTranslate2's model.bin: named variables one behind the other, and names that stand for others.

    u32 version, text kind, u32 revision, u32 n, n times {text name, u8 rank, u32 dims[rank], u8 type, u32 bytes, data},
    u32 m, m times {text alias, text name};      text: u16 length with its closing NUL, then that many bytes

Only the table is read on opening; a variable's data when it is asked for.
Clauses: FM-CT2-1..4 (specs/audio.md).  Source: CTranslate2 4.x, `models/model.cc` (`Model::load`), versions 4 to 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ferrum_ref.errors import NotFoundError
from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.formats.complaint import invalid, quoted, unsupported
from ferrum_ref.formats.elements import Array, StoredTensor, is_sound_shape, stored_bytes, unpacked

_VERSIONS: Final = (4, 6)
_MAX_VARIABLES: Final = 1 << 16
_ELEMENT_OF: Final[Mapping[int, str]] = MappingProxyType({0: "F32", 1: "I8", 2: "I16", 3: "I32", 4: "F16", 5: "BF16"})


@dataclass(frozen=True, slots=True)
class _Place:
    tensor: StoredTensor
    offset: int


class CTranslate2File:
    """An open model.bin: `kind` ("WhisperSpec", ...), `revision`, `variables`, `aliases`.  [FM-CT2-1]

    Safe for concurrent reads.
    """

    def __init__(self, source: ByteSource) -> None:
        """Raises InvalidFormatError (what the bytes say cannot be), UnsupportedError (version, element type)."""
        self._source = source
        cursor = _Cursor(source)
        version = cursor.number(4, "version")
        if not _VERSIONS[0] <= version <= _VERSIONS[1]:
            raise unsupported("CTranslate2", source.name, "version", version, f"{_VERSIONS[0]} to {_VERSIONS[1]}")
        self.kind = cursor.text("kind")
        self.revision = cursor.number(4, "revision")
        self._places = _variables(cursor)
        self.aliases: Mapping[str, str] = MappingProxyType(_aliases(cursor, self._places))
        if cursor.position != source.size:
            got = f"{source.size - cursor.position} bytes behind the end"
            raise invalid("CTranslate2", source.name, "file", got, "none")
        self.variables: Mapping[str, StoredTensor] = MappingProxyType(
            {name: place.tensor for name, place in self._places.items()}
        )

    def read(self, name: str) -> Array:
        """The variable's values in their stored type, as a fresh array.  [FM-CT2-3]

        Raises NotFoundError (no such name or alias), FerrumIOError (the file has shrunk since).
        """
        place = self._places.get(self.aliases.get(name, name))
        if place is None:
            raise NotFoundError(f"read CTranslate2 {self._source.name}: {quoted(name)}: no such variable")
        raw = self._source.array(place.offset, place.tensor.num_bytes)
        return unpacked(raw, place.tensor.element, place.tensor.shape)

    def close(self) -> None:
        """Release the file; arrays already read stay valid."""
        self._source.close()


class _Cursor:
    """Reads one thing after another."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.position = 0

    def take(self, num_bytes: int, field: str) -> bytes:
        if num_bytes > self.source.size - self.position:
            got = f"{self.source.size - self.position} bytes left"
            raise invalid("CTranslate2", self.source.name, field, got, f"at least {num_bytes}")
        data = self.source.read(self.position, num_bytes)
        self.position += num_bytes
        return data

    def skip(self, num_bytes: int) -> None:
        self.position += num_bytes

    def number(self, num_bytes: int, field: str) -> int:
        return int.from_bytes(self.take(num_bytes, field), "little")

    def text(self, field: str) -> str:
        data = self.take(self.number(2, field), field)
        try:
            text = data.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            raise invalid("CTranslate2", self.source.name, field, data[:40], "UTF-8") from None
        if not text or "\0" in text:
            raise invalid("CTranslate2", self.source.name, field, text, "a name")
        return text


def _count(cursor: _Cursor, field: str) -> int:
    count = cursor.number(4, field)
    if count > _MAX_VARIABLES:
        raise invalid("CTranslate2", cursor.source.name, field, count, f"at most {_MAX_VARIABLES}")
    return count


def _variables(cursor: _Cursor) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for _ in range(_count(cursor, "number of variables")):
        name = cursor.text("name of a variable")
        if name in places:
            raise invalid("CTranslate2", cursor.source.name, name, "the name twice", "a new name")
        places[name] = _variable(cursor, name)
    return places


def _variable(cursor: _Cursor, name: str) -> _Place:
    """The description; the cursor is left behind the data.  [FM-CT2-2]"""
    rank = cursor.number(1, name)
    data = cursor.take(4 * rank, name)
    shape = tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))
    if not is_sound_shape(shape):
        raise invalid("CTranslate2", cursor.source.name, name, f"shape {list(shape)}", "sizes that an array can have")
    kind = cursor.number(1, name)
    if kind not in _ELEMENT_OF:
        expected = ", ".join(f"{number} ({element})" for number, element in _ELEMENT_OF.items())
        raise unsupported("CTranslate2", cursor.source.name, name, f"element type {kind}", f"one of {expected}")
    element = _ELEMENT_OF[kind]
    num_bytes = cursor.number(4, name)
    expected_bytes = stored_bytes(element, math.prod(shape))
    if num_bytes != expected_bytes:
        expected = f"the {expected_bytes} of {element}{list(shape)}"
        raise invalid("CTranslate2", cursor.source.name, name, f"{num_bytes} bytes", expected)
    left = cursor.source.size - cursor.position
    if num_bytes > left:
        raise invalid("CTranslate2", cursor.source.name, name, f"{left} bytes left", f"{num_bytes} bytes of data")
    place = _Place(StoredTensor(name, shape, element, num_bytes), cursor.position)
    cursor.skip(num_bytes)
    return place


def _aliases(cursor: _Cursor, places: Mapping[str, _Place]) -> dict[str, str]:
    """Other names for variables; an alias of an alias is refused.  [FM-CT2-4]"""
    aliases: dict[str, str] = {}
    for _ in range(_count(cursor, "number of aliases")):
        alias, name = cursor.text("alias"), cursor.text("name behind an alias")
        if alias in places or alias in aliases or name not in places:
            got = f"alias of {quoted(name)}"
            raise invalid("CTranslate2", cursor.source.name, alias, got, "a new name for a variable that is there")
        aliases[alias] = name
    return aliases
