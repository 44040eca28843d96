"""One safetensors file, memory-mapped: its header checked, its tensors views of the map.

    u64 n, then n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the data

The library's own reader copies every tensor out of its map; here a tensor that is only multiplied by stays on disk.
Clauses: MD-SAFE-1..4 (specs/model_files.md).  Source: the format section of the safetensors README.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.formats.json_file import parse_json_object
from ferrum_ref.formats.mapped import release_pages

_MAX_HEADER_BYTES: Final = 100_000_000  # the library's own limit
_METADATA: Final = "__metadata__"
_ELEMENT_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "I64": 64,
        "U64": 64,
        "F64": 64,
        "C64": 64,
    }
)


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """A tensor's row of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin_bytes: int  # from the start of the data
    end_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.end_bytes - self.begin_bytes


@dataclass(frozen=True, slots=True)
class SafeHeader:
    """A header's tensors by name, its free-form texts, and where in the file the data begin."""

    tensors: Mapping[str, SafeTensor]
    metadata: Mapping[str, Any]
    data_offset: int


class SafetensorsFile:
    """An open safetensors file.  Safe for concurrent reads.  [MD-SAFE-1]"""

    def __init__(self, path: Path) -> None:
        """Raises NotFoundError, FerrumIOError, InvalidFormatError."""
        self.path = path
        header, self._map = _open(path)
        self.tensors: Mapping[str, SafeTensor] = header.tensors
        self.num_bytes = len(self._map)
        self._data_offset = header.data_offset
        self._closed = False

    def packed(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored, with its leading dimensions: a read-only view of the map.  [MD-SAFE-4]"""
        if self._closed:
            raise FerrumIOError(f"read safetensors {self.path}: tensor {name!r}: the file was closed")
        if name not in self.tensors:
            raise NotFoundError(f"read safetensors {self.path}: tensor {name!r}: got no such name")
        tensor = self.tensors[name]
        leading = tensor.shape[:-1]
        row_bytes = tensor.num_bytes // max(1, math.prod(leading))
        flat = np.frombuffer(self._map, np.uint8, tensor.num_bytes, self._data_offset + tensor.begin_bytes)
        return flat.reshape(*leading, row_bytes)

    def release(self, name: str) -> None:
        """Let the tensor's pages leave resident memory; reading it again brings them back.  [MD-PACK-5]"""
        tensor = self.tensors[name]
        release_pages(self._map, self._data_offset + tensor.begin_bytes, tensor.num_bytes)

    def close(self) -> None:
        """Unmap.  Views handed out keep the map alive until they are dropped.  [MD-SAFE-5]"""
        self._closed = True
        try:
            self._map.close()
        except BufferError:
            return  # a view is still in use; the map goes with the last one


def _open(path: Path) -> tuple[SafeHeader, mmap.mmap]:
    """The header, checked against the file's size and against itself, and the map.  [MD-SAFE-1..3]"""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path, file.read(8), size)
            header = _parse_header(path, file.read(length), size)
            return header, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise NotFoundError(f"read safetensors {path}: no such file") from None
    except OSError as error:
        raise FerrumIOError(f"read safetensors {path}: {error.strerror or error}") from error


def parse_header(source: ByteSource) -> SafeHeader:
    """The checked header of bytes wherever they lie; only the header is read.  [MD-SAFE-2, MD-SAFE-3]

    Raises InvalidFormatError, and what reading the source raises.
    """
    length = _header_length(source.name, source.read(0, min(8, source.size)), source.size)
    return _parse_header(source.name, source.read(8, length), source.size)


def _header_length(path: Path | str, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        _fail(path, "header", f"{length} bytes in a file of {size}", f"at most {max(0, size - 8)}")
    return length


def _parse_header(path: Path | str, data: bytes, size: int) -> SafeHeader:
    header = parse_json_object(data, f"safetensors {path}: header")
    tensors = {name: _tensor(path, name, row) for name, row in header.items() if name != _METADATA}
    _require_tiling(path, tensors, size - 8 - len(data))
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _fail(path, _METADATA, f"{metadata!r:.80}", "an object of texts")
    return SafeHeader(MappingProxyType(tensors), metadata, 8 + len(data))


def _tensor(path: Path | str, name: str, row: Any) -> SafeTensor:
    what = f"tensor {name!a:.100}"
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        _fail(path, what, f"{row!r:.80}", "dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BITS:
        _fail(path, what, f"dtype {dtype!r:.80}", f"one of {', '.join(_ELEMENT_BITS)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        _fail(path, what, f"shape {shape!r:.80}", "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _fail(path, what, f"data_offsets {offsets!r:.80}", "[begin, end]")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _ELEMENT_BITS[dtype]:
        expected = f"the {math.prod(shape) * _ELEMENT_BITS[dtype] // 8} bytes of {dtype}{shape}"
        _fail(path, what, f"{end - begin} bytes at {begin}", f"{expected:.120}")
    return SafeTensor(name, dtype, tuple(shape), begin, end)


def _require_tiling(path: Path | str, tensors: Mapping[str, SafeTensor], data_bytes: int) -> None:
    """The data is covered exactly: no gap, no overlap, nothing behind the end.  [MD-SAFE-3]"""
    position = 0
    for tensor in sorted(tensors.values(), key=lambda each: (each.begin_bytes, each.end_bytes)):
        if tensor.begin_bytes != position:
            _fail(path, f"tensor {tensor.name!a:.100}", f"a begin at byte {tensor.begin_bytes}", f"{position}")
        position = tensor.end_bytes
    if position != data_bytes:
        _fail(path, "data", f"{data_bytes} bytes in the file", f"the {position} that the header names")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _fail(path: Path | str, field: str, got: str, expected: str) -> NoReturn:
    raise InvalidFormatError(f"read safetensors {path}: {field}: got {got}, expected {expected}; get the file again")
