"""One container per format, over the readers in `formats`.  Clauses: WL-CONTAINER-2..3, WL-RAW-1..2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ModelError
from ferrum_ref.formats.byte_source import ByteSource, FileBytes
from ferrum_ref.formats.complaint import invalid, unsupported
from ferrum_ref.formats.elements import ELEMENTS, Array, StoredTensor, is_sound_shape, stored_bytes, unpacked
from ferrum_ref.formats.gguf import GgufFile
from ferrum_ref.formats.npy import LONGEST_PREFIX_BYTES, NpyHeader, npy_values, read_npy_header
from ferrum_ref.formats.onnx_initializers import OnnxFile
from ferrum_ref.formats.pytorch import PyTorchFile
from ferrum_ref.formats.pytorch_values import SINGLE
from ferrum_ref.formats.safetensors import parse_header
from ferrum_ref.formats.zip_entries import ZipEntries
from ferrum_ref.interfaces.weights import WeightFormat
from ferrum_ref.kernels.quant import decode
from ferrum_ref.weights.containers import Container, found

_PLAIN_GGML: Final[Mapping[str, str]] = MappingProxyType(
    {
        "F32": "F32",
        "F16": "F16",
        "BF16": "BF16",
        "F64": "F64",
        "I8": "I8",
        "I16": "I16",
        "I32": "I32",
        "I64": "I64",
    }
)


class SafetensorsContainer(Container):
    """One safetensors file."""

    format = WeightFormat.SafeTensors

    def __init__(self, source: ByteSource) -> None:
        self.name, self._source = source.name, source
        self._header = parse_header(source)
        rows = self._header.tensors.values()
        self._tensors = {row.name: StoredTensor(row.name, row.shape, row.dtype, row.num_bytes) for row in rows}
        for stored in self._tensors.values():
            if not is_sound_shape(stored.shape):
                raise invalid(
                    "safetensors", self.name, stored.name, f"shape {stored.shape}", "sizes that fit in memory"
                )

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def read(self, name: str, limit_bytes: int) -> Array:
        stored = found(self, self._tensors, name, limit_bytes)
        if stored.element not in ELEMENTS:
            raise unsupported("safetensors", self.name, name, stored.element, f"one of {', '.join(ELEMENTS)}")
        begin = self._header.data_offset + self._header.tensors[name].begin_bytes
        return unpacked(self._source.array(begin, stored.num_bytes), stored.element, stored.shape)

    def extra(self) -> Mapping[str, Any]:
        return self._header.metadata


class GgufContainer(Container):
    """A GGUF file; names and row order are the file's own, not Hugging Face's."""

    format = WeightFormat.Gguf

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        if isinstance(source, FileBytes):
            self._file = GgufFile(source.path)
        else:
            self._file = GgufFile(source.name, source.read(0, source.size))
        self._tensors = {
            name: StoredTensor(name, tensor.shape, tensor.type_label, tensor.num_bytes)
            for name, tensor in self._file.tensors.items()
        }

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def read(self, name: str, limit_bytes: int) -> Array:
        stored = found(self, self._tensors, name, limit_bytes)
        packed = self._file.packed(name)
        plain = _PLAIN_GGML.get(stored.element)
        if plain is not None:
            return unpacked(packed.copy(), plain, stored.shape)
        found(self, {name: replace(stored, num_bytes=stored.num_elements * 4)}, name, limit_bytes)
        return decode(stored.element, packed).reshape(stored.shape)

    def extra(self) -> Mapping[str, Any]:
        return {key: value for key, value in self._file.metadata.items() if isinstance(value, (str, int, float, bool))}


class NpyContainer(Container):
    """One array without a name: any name asks for it; `tensors` calls it "tensor"."""

    format = WeightFormat.Numpy

    def __init__(self, source: ByteSource) -> None:
        self.name, self._source = source.name, source
        prefix = source.read(0, min(source.size, LONGEST_PREFIX_BYTES))
        self._header = read_npy_header(prefix, source.size, source.name)
        self._stored = _stored_npy(SINGLE, self._header)

    def tensors(self) -> Mapping[str, StoredTensor]:
        return {SINGLE: self._stored}

    def read(self, name: str, limit_bytes: int) -> Array:
        found(self, {name: self._stored}, name, limit_bytes)
        return npy_values(self._source.array(self._header.data_offset, self._header.num_bytes), self._header)


class NpzContainer(Container):
    """A zip archive of arrays; the names are the entries' without .npy."""

    format = WeightFormat.Numpy

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        self._zip = ZipEntries(source, "npz")
        self._headers: dict[str, NpyHeader] = {}
        for entry in self._zip.names:
            name = entry.removesuffix(".npy")
            if name in self._headers or name == entry:
                raise invalid("npz", source.name, "entry", entry, "one array per name, ending in .npy")
            prefix = self._zip.prefix(entry, LONGEST_PREFIX_BYTES)
            self._headers[name] = read_npy_header(prefix, self._zip.num_bytes(entry), f"{source.name}/{entry:.100}")
        self._tensors = {name: _stored_npy(name, header) for name, header in self._headers.items()}

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def read(self, name: str, limit_bytes: int) -> Array:
        found(self, self._tensors, name, limit_bytes)
        header = self._headers[name]
        content = self._zip.read(f"{name}.npy", header.data_offset + header.num_bytes)
        if read_npy_header(content[: header.data_offset].tobytes(), len(content), self.name) != header:
            raise invalid("npz", self.name, name, "another header", "the one that was read first")
        return npy_values(content[header.data_offset :].copy(), header)


class PyTorchContainer(Container):
    """A PyTorch checkpoint, weights only."""

    format = WeightFormat.PyTorch

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        self._file = PyTorchFile(source)

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._file.tensors

    def read(self, name: str, limit_bytes: int) -> Array:
        if name not in self._file.tensors and list(self._file.tensors) == [SINGLE]:
            name = SINGLE  # a bare tensor: any name asks for it
        found(self, self._file.tensors, name, limit_bytes)
        return self._file.read(name, limit_bytes)


class OnnxContainer(Container):
    """The initialisers of an ONNX model."""

    format = WeightFormat.Onnx

    def __init__(self, source: ByteSource, directory: Path | None) -> None:
        self.name = source.name
        self._file = OnnxFile(source, directory)

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._file.tensors

    def read(self, name: str, limit_bytes: int) -> Array:
        found(self, self._file.tensors, name, limit_bytes)
        return self._file.read(name, limit_bytes)

    def extra(self) -> Mapping[str, Any]:
        return {"producer": self._file.producer} if self._file.producer else {}


class RawContainer(Container):
    """Bare little-endian bytes: what they are, the request must say.  [WL-RAW-1]"""

    format = WeightFormat.Raw

    def __init__(self, source: ByteSource) -> None:
        self.name, self._source = source.name, source

    def tensors(self) -> Mapping[str, StoredTensor]:
        return {SINGLE: StoredTensor(SINGLE, (self._source.size,), "U8", self._source.size)}

    def read(self, name: str, limit_bytes: int) -> Array:
        found(self, {name: self.tensors()[SINGLE]}, name, limit_bytes)
        return self._source.array(0, self._source.size)

    def read_as(self, name: str, element: str, shape: tuple[int, ...], limit_bytes: int) -> Array:
        """All bytes as this type and shape.  Raises ModelError when their number differs."""
        raw = self.read(name, limit_bytes)
        expected = stored_bytes(element, math.prod(shape))
        if len(raw) != expected:
            raise ModelError(
                f"load {self.name}: raw bytes: got {len(raw)}, expected the {expected} of {element}{list(shape)}"
            )
        return unpacked(raw, element, shape)


def _stored_npy(name: str, header: NpyHeader) -> StoredTensor:
    return StoredTensor(name, header.shape, header.element, header.num_bytes)
