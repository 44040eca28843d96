"""As much of the protobuf wire format as SentencePiece's model files use.

A message is a run of fields, each a key (number * 8 + wire type) and a value: 0 a varint, 1 eight bytes, 2 a length
and so many bytes, 5 four bytes.  Source: Protocol Buffers, "Encoding".  Clause: TK-SPM-6 (specs/tokenizer.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

_VARINT: Final = 0
_EIGHT_BYTES: Final = 1
_LENGTH: Final = 2
_FOUR_BYTES: Final = 5
_MAX_VARINT_BYTES: Final = 10

Value = int | float | bytes


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message, in the order of the file; four bytes are a float.  Raises ValueError."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == _LENGTH:
            size, place = _varint(data, place)
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            size = 4 if wire == _FOUR_BYTES else 8
        else:
            raise ValueError(f"byte {place}: got wire type {wire}, expected 0, 1, 2 or 5")
        if place + size > len(data):
            raise ValueError(f"byte {place}: got {len(data) - place} bytes, expected {size}")
        raw = data[place : place + size]
        place += size
        yield number, struct.unpack("<f", raw)[0] if wire == _FOUR_BYTES else raw


def signed(value: int) -> int:
    """A varint as the 64-bit signed number that it may stand for."""
    return value - 2**64 if value >= 2**63 else value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if place + index >= len(data):
            raise ValueError(f"byte {place}: got the end, expected a number")
        byte = data[place + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value % 2**64, place + index + 1
    raise ValueError(f"byte {place}: got a number of more than {_MAX_VARINT_BYTES} bytes, expected a shorter one")
