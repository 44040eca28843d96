"""The .npy header, read by a grammar of its own: nothing is evaluated, and objects (pickles) are refused.

    magic "\\x93NUMPY", version (2 bytes), header length (u16, from version 2 on u32), header, data
    header  {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }

Clauses: WL-NPY-1..3 (specs/weights.md).  Source: numpy.lib.format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.formats.complaint import invalid, unsupported
from ferrum_ref.formats.elements import ELEMENTS, MAX_DIMENSIONS, Array, is_sound_shape, unpacked

MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER_BYTES: Final = 65_536
LONGEST_PREFIX_BYTES: Final = 12 + _MAX_HEADER_BYTES
_PAIR: Final = re.compile(
    r"\s*'(descr|fortran_order|shape)'\s*:\s*('[^'\\]*'|True|False|\((?:\s*\d{1,19}\s*,)*(?:\s*\d{1,19}\s*)?\s*\))\s*(,?)"
)
_ELEMENT_OF: Final[Mapping[str, str]] = MappingProxyType(
    {
        "b1": "BOOL",
        "u1": "U8",
        "i1": "I8",
        "u2": "U16",
        "i2": "I16",
        "u4": "U32",
        "i4": "I32",
        "u8": "U64",
        "i8": "I64",
        "f2": "F16",
        "f4": "F32",
        "f8": "F64",
    }
)


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """Shape, element type, byte order and where the data begin."""

    shape: tuple[int, ...]
    element: str
    big_endian: bool
    fortran_order: bool
    data_offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENTS[self.element].itemsize


def read_npy_header(prefix: bytes, total_bytes: int, source: str) -> NpyHeader:
    """The header in the first bytes (up to LONGEST_PREFIX_BYTES) of an array of `total_bytes`.  [WL-NPY-1..3]

    Pure. Raises InvalidFormatError (not npy, a header that lies about the size), UnsupportedError (objects, records,
    texts, complex numbers).
    """
    if prefix[:6] != MAGIC or len(prefix) < 10:
        raise invalid("npy", source, "magic", prefix[:6], "\\x93NUMPY")
    width = 2 if prefix[6] == 1 else 4
    start = 8 + width
    length = int.from_bytes(prefix[8:start], "little")
    if prefix[6] not in (1, 2, 3) or prefix[7] != 0:
        raise invalid("npy", source, "version", f"{prefix[6]}.{prefix[7]}", "1.0, 2.0 or 3.0")
    if length > min(_MAX_HEADER_BYTES, total_bytes - start) or start + length > len(prefix):
        raise invalid("npy", source, "header length", length, f"at most {_MAX_HEADER_BYTES} and within the file")
    pairs = _pairs(prefix[start : start + length], source)
    element, big_endian = _element(pairs["descr"], source)
    shape = _shape(pairs["shape"], source)
    header = NpyHeader(shape, element, big_endian, pairs["fortran_order"] == "True", start + length)
    if header.data_offset + header.num_bytes != total_bytes:
        got = f"{total_bytes - header.data_offset} bytes of data"
        raise invalid("npy", source, "data", got, f"the {header.num_bytes} of {element}{list(shape)}")
    return header


def npy_values(raw: NDArray[np.uint8], header: NpyHeader) -> Array:
    """The data bytes as an array of the header's shape.  Pure; may share memory with `raw`."""
    if header.big_endian:
        size = ELEMENTS[header.element].itemsize
        raw = np.ascontiguousarray(raw.reshape(-1, size)[:, ::-1]).reshape(-1)
    if header.fortran_order:
        return unpacked(raw, header.element, header.shape[::-1]).T
    return unpacked(raw, header.element, header.shape)


def _pairs(header: bytes, source: str) -> dict[str, str]:
    text = header.decode("latin-1").strip()
    if re.search(r"'descr'\s*:\s*\[", text):
        raise unsupported("npy", source, "descr", "a record type", "plain numbers; save one array per field")
    found: dict[str, str] = {}
    position, closed = 1, text.startswith("{") and text.endswith("}")
    while closed and (match := _PAIR.match(text, position)):
        if match[1] in found:
            break
        found[match[1]] = match[2]
        position = match.end()
        if not match[3]:
            break
    well_formed = (
        closed
        and text[position:-1].strip() == ""
        and len(found) == 3
        and found["descr"].startswith("'")
        and found["fortran_order"] in ("True", "False")
        and found["shape"].startswith("(")
    )
    if not well_formed:
        raise invalid("npy", source, "header", text, "{'descr': ..., 'fortran_order': ..., 'shape': (...)}")
    return found


def _element(descr: str, source: str) -> tuple[str, bool]:
    text = descr.strip("'")
    order, kind = (text[0], text[1:]) if text[:1] in ("<", ">", "|", "=") else ("<", text)
    if kind.startswith("O"):
        raise unsupported("npy", source, "descr", text, "numbers: objects are pickles, and pickles may run code")
    if kind not in _ELEMENT_OF:
        raise unsupported("npy", source, "descr", text, f"one of {', '.join(_ELEMENT_OF)} (numpy saves bfloat16 as V2)")
    return _ELEMENT_OF[kind], order == ">"


def _shape(text: str, source: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.strip("()").split(",") if size.strip())
    if not is_sound_shape(sizes) or (len(sizes) == 1 and "," not in text):
        raise invalid("npy", source, "shape", text, f"a tuple of at most {MAX_DIMENSIONS} sizes that fit in memory")
    return sizes
