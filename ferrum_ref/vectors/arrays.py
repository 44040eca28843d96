"""Arrays to and from safetensors files: the same arrays give the same bytes.   Clauses: GV-FORMAT-3..5."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.elements import ELEMENTS, Array, unpacked
from ferrum_ref.formats.safetensors import SafetensorsFile

ELEMENT_NAMES: Final[Mapping[np.dtype[Any], str]] = MappingProxyType({dtype: name for name, dtype in ELEMENTS.items()})


def element_name(array: Array) -> str:
    """safetensors' name of the array's element type. Raises KeyError for a type that no file can hold. Pure."""
    return ELEMENT_NAMES[array.dtype]


def encode(arrays: Mapping[str, Array]) -> bytes:
    """The safetensors file that holds `arrays`, little-endian and contiguous. Pure.  [GV-FORMAT-5]"""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}))


def write_file(path: Path, data: bytes) -> None:
    """`data` as the file `path`, whole or not at all. Raises FerrumIOError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise FerrumIOError(f"write {path}: {error.strerror or error}") from error


def read_tensor(file: SafetensorsFile, name: str) -> Array:
    """A tensor of an open file as an array of its own. Raises NotFoundError."""
    if name not in file.tensors:
        raise NotFoundError(f"read safetensors {file.path}: tensor {name!r}: got no such name")
    row = file.tensors[name]
    if row.dtype not in ELEMENTS:
        raise InvalidFormatError(
            f"read safetensors {file.path}: {name}: got {row.dtype}, expected {', '.join(ELEMENTS)}"
        )
    return unpacked(file.packed(name).reshape(-1).copy(), row.dtype, row.shape)


def open_checked(path: Path, num_bytes: int, sha256: str) -> SafetensorsFile:
    """The file, after a look that it is the one that the manifest was written with.  [GV-FORMAT-4]

    Raises NotFoundError, FerrumIOError, InvalidFormatError (truncated, changed, or no safetensors file).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"read {path}: no such file; the manifest beside it names it: get the whole set") from None
    except OSError as error:
        raise FerrumIOError(f"read {path}: {error.strerror or error}") from error
    if len(data) != num_bytes:
        raise InvalidFormatError(f"read {path}: got {len(data)} bytes, expected {num_bytes}; get the file again")
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise InvalidFormatError(f"read {path}: got SHA-256 {found}, expected {sha256}; get the file again")
    return SafetensorsFile(path)
