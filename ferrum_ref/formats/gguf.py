"""GGUF, the container of llama.cpp: metadata and tensors of one memory-mapped file.

    header   magic "GGUF", version u32 (2 or 3), number of tensors u64, number of metadata pairs u64
    pairs    key string, value type u32, value
    tensors  name string, number of dimensions u32, dimensions u64 (fastest first), type u32, offset u64
    data     starts at the next multiple of general.alignment (32 unless said otherwise)

Only the header is read on opening; tensor bytes stay on disk until asked for.  The reader trusts nothing: see the
checks in specs/model_files.md, MD-GGUF-1..8.  Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.ggml_types import GGML_TYPES
from ferrum_ref.formats.gguf_values import Cursor, GgufValue
from ferrum_ref.formats.mapped import release_pages

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
_LEAST_PAIR_BYTES: Final = 8 + 4 + 1
_LEAST_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; `shape` is row-major (slowest dimension first, as numpy has it)."""

    name: str
    shape: tuple[int, ...]
    type_label: str
    offset_bytes: int  # from the start of the file
    num_bytes: int


class GgufFile:
    """An open GGUF file.  Safe for concurrent reads.  [MD-GGUF-1]"""

    def __init__(self, path: str | Path, data: bytes | None = None) -> None:
        """Open, map and validate; with `data` these bytes are the file, and `path` only its name in messages.

        Raises NotFoundError, FerrumIOError, InvalidFormatError, UnsupportedError.
        """
        self.path = Path(path)
        self._closed = False
        self._map = _map_file(self.path) if data is None else data
        try:
            cursor = Cursor(self._map, str(self.path))
            self.version, num_tensors, num_pairs = _read_header(cursor)
            self.metadata: Mapping[str, GgufValue] = MappingProxyType(_read_metadata(cursor, num_pairs))
            self.alignment = _alignment(cursor, self.metadata)
            self.tensors: Mapping[str, GgufTensor] = MappingProxyType(
                _read_tensors(cursor, num_tensors, self.alignment)
            )
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        return len(self._map)

    def packed(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored: a read-only 1-D view of the map, nothing copied.  [MD-GGUF-7]"""
        if name not in self.tensors:
            raise NotFoundError(f"read GGUF {self.path}: tensor {name!r}: got no such name")
        if self._closed:
            raise FerrumIOError(f"read GGUF {self.path}: tensor {name!r}: the file was closed")
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset_bytes)

    def release(self, name: str) -> None:
        """Let the tensor's pages leave resident memory; reading it again brings them back.  [MD-PACK-5]"""
        tensor = self.tensors[name]
        release_pages(self._map, tensor.offset_bytes, tensor.num_bytes)

    def close(self) -> None:
        """Unmap.  Views handed out keep the map alive until they are dropped."""
        self._closed = True
        if isinstance(self._map, bytes):
            return
        try:
            self._map.close()
        except BufferError:
            return  # a view is still in use; the map goes with the last one

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def is_gguf(path: Path) -> bool:
    """True when the file starts with GGUF's magic."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise InvalidFormatError(f"read GGUF {path}: file: got 0 bytes, expected a GGUF header")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise NotFoundError(f"read GGUF {path}: no such file") from None
    except OSError as error:
        raise FerrumIOError(f"read GGUF {path}: {error.strerror or error}") from error


def _read_header(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of metadata pairs.  [MD-GGUF-2]"""
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        cursor.fail("magic", magic, MAGIC)
    version = cursor.u32("version")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
            raise UnsupportedError(f"read GGUF {cursor.path}: version: got a big-endian file, expected little-endian")
        cursor.fail("version", version, " or ".join(map(str, _VERSIONS)))
    num_tensors, num_pairs = cursor.u64("number of tensors"), cursor.u64("number of metadata pairs")
    cursor.require(num_tensors, _LEAST_TENSOR_BYTES, "number of tensors")
    cursor.require(num_pairs, _LEAST_PAIR_BYTES, "number of metadata pairs")
    return version, num_tensors, num_pairs


def _read_metadata(cursor: Cursor, num_pairs: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for index in range(num_pairs):
        key = cursor.string(f"metadata key {index}")
        if not key or key in metadata:
            cursor.fail(f"metadata key {index}", repr(key), "a new name")
        metadata[key] = cursor.value(cursor.u32(f"{key}: value type"), key)
    return metadata


def _alignment(cursor: Cursor, metadata: Mapping[str, GgufValue]) -> int:
    found = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(found, int) or isinstance(found, bool) or found <= 0 or found & (found - 1):
        cursor.fail("general.alignment", found, "a power of two")
    return found


def _read_tensors(cursor: Cursor, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
    """Tensor table with absolute offsets, each inside the file and none upon another.  [MD-GGUF-4..6]"""
    relative: dict[str, GgufTensor] = {}
    for index in range(num_tensors):
        tensor = _read_tensor(cursor, index)
        if not tensor.name or tensor.name in relative:
            cursor.fail(f"tensor {index}: name", repr(tensor.name), "a new name")
        relative[tensor.name] = tensor
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for tensor in relative.values():
        if tensor.offset_bytes % alignment:
            cursor.fail(f"tensor {tensor.name}: offset", tensor.offset_bytes, f"a multiple of {alignment}")
        start = data_start + tensor.offset_bytes
        if start + tensor.num_bytes > cursor.size:
            got = f"bytes {start} to {start + tensor.num_bytes}"
            cursor.fail(f"tensor {tensor.name}: data", got, f"an end within the file's {cursor.size} bytes")
        tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.type_label, start, tensor.num_bytes)
    _refuse_overlap(cursor, tensors)
    return tensors


def _read_tensor(cursor: Cursor, index: int) -> GgufTensor:
    name = cursor.string(f"tensor {index}: name")
    num_dimensions = cursor.u32(f"tensor {name}: number of dimensions")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        cursor.fail(f"tensor {name}: number of dimensions", num_dimensions, f"1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"tensor {name}: dimension {i}") for i in range(num_dimensions))[::-1]
    if 0 in shape:
        cursor.fail(f"tensor {name}: shape", list(shape), "dimensions of at least 1")
    code = cursor.u32(f"tensor {name}: type")
    if code not in GGML_TYPES:
        cursor.fail(f"tensor {name}: type", code, f"a ggml type ({', '.join(map(str, GGML_TYPES))})")
    kind = GGML_TYPES[code]
    if shape[-1] % kind.block_elements:
        expected = f"a multiple of {kind.block_elements}, the block of {kind.label}"
        cursor.fail(f"tensor {name}: row", f"{shape[-1]} elements", expected)
    num_bytes = math.prod(shape) // kind.block_elements * kind.block_bytes
    return GgufTensor(name, shape, kind.label, cursor.u64(f"tensor {name}: offset"), num_bytes)


def _refuse_overlap(cursor: Cursor, tensors: Mapping[str, GgufTensor]) -> None:
    end_bytes, owner = 0, ""
    for tensor in sorted(tensors.values(), key=lambda each: each.offset_bytes):
        if tensor.offset_bytes < end_bytes:
            cursor.fail(f"tensor {tensor.name}: offset", tensor.offset_bytes, f"{end_bytes} or more, behind {owner}")
        end_bytes, owner = tensor.offset_bytes + tensor.num_bytes, tensor.name
