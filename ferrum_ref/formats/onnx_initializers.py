"""The initialisers of an ONNX model: the weights its graph starts from, through the onnx package's message classes.

Only the protobuf is parsed; no graph is built, checked or run.  A tensor's data may lie in a file beside the model:
its name must be plain or relative and stay inside the model's directory, symbolic links followed.
Clauses: WL-ONNX-1..4 (specs/weights.md).  Source: onnx.proto, "External Data" of the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import FerrumError, NotFoundError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.formats.byte_source import ByteSource, FileBytes
from ferrum_ref.formats.complaint import invalid, quoted, unsupported
from ferrum_ref.formats.elements import Array, StoredTensor, is_sound_shape, stored_bytes, unpacked

_EXTERNAL: Final = 1  # TensorProto.DataLocation.EXTERNAL
_MAX_MODEL_BYTES: Final = 2**31 - 1  # protobuf's own limit
_ELEMENT_OF: Final[Mapping[int, str]] = MappingProxyType(
    {
        1: "F32",
        2: "U8",
        3: "I8",
        4: "U16",
        5: "I16",
        6: "I32",
        7: "I64",
        9: "BOOL",
        10: "F16",
        11: "F64",
        12: "U32",
        13: "U64",
        16: "BF16",
        17: "F8_E4M3",
        19: "F8_E5M2",
        21: "U4",
        22: "I4",
    }
)
_FIELD_OF: Final[Mapping[str, str]] = MappingProxyType(
    {"F32": "float_data", "F64": "double_data", "I64": "int64_data", "U32": "uint64_data", "U64": "uint64_data"}
)  # all others: int32_data


class OnnxFile:
    """An open model; `tensors` by initialiser name.  Safe for concurrent reads.  [WL-ONNX-1]"""

    def __init__(self, source: ByteSource, directory: Path | None, model: Any = None) -> None:
        """`directory`: where external data may lie, or None; `model`: the parsed message, where it is in hand.

        Raises InvalidFormatError, UnsupportedError (the onnx package is absent, or an element type).
        """
        self._source, self._directory = source, directory
        self._protos: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.producer = ""
        try:
            self._read(parsed_model(source) if model is None else model)
        except (UnicodeError, ValueError, AttributeError) as error:
            raise invalid("ONNX", source.name, "model", type(error).__name__, "a readable message") from None

    def _read(self, model: Any) -> None:
        if not model.HasField("graph"):
            raise invalid("ONNX", self._source.name, "model", "no graph", "a graph with initialisers")
        self.producer = self._text(model.producer_name)[:100]
        for proto in model.graph.initializer:
            name = self._text(proto.name)
            if not name or name in self._protos:
                raise invalid("ONNX", self._source.name, "initialiser", name, "a new name")
            self._protos[name] = proto
            self.tensors[name] = self._stored(name, proto)

    def read(self, name: str, limit_bytes: int) -> Array:
        """The initialiser's values.  [WL-ONNX-2..4]

        Raises NotFoundError (the name, or the external file), InvalidFormatError, ResourceExhaustedError.
        """
        if name not in self.tensors:
            raise NotFoundError(f"read ONNX {self._source.name}: initialiser {name!a:.100}: got no such name")
        stored, proto = self.tensors[name], self._protos[name]
        if stored.num_bytes > limit_bytes:
            raise ResourceExhaustedError(
                f"read ONNX {self._source.name}: initialiser {name!a:.100}: got {stored.num_bytes} bytes, "
                f"expected at most {limit_bytes}; raise the loader's max_tensor_bytes"
            )
        if proto.data_location == _EXTERNAL:
            return unpacked(self._external(stored, proto), stored.element, stored.shape)
        if proto.HasField("raw_data"):
            raw = np.frombuffer(proto.raw_data, np.uint8)
            self._require_size(stored, len(raw))
            return unpacked(raw, stored.element, stored.shape)
        return self._typed(stored, proto)

    def _text(self, field: Any) -> str:
        """A text field; protobuf hands out bytes when they are not UTF-8."""
        if not isinstance(field, str):
            raise invalid("ONNX", self._source.name, "text", field, "UTF-8")
        return field

    def _stored(self, name: str, proto: Any) -> StoredTensor:
        element = _ELEMENT_OF.get(proto.data_type)
        if element is None:
            raise unsupported(
                "ONNX",
                self._source.name,
                name,
                f"element type {proto.data_type}",
                "numbers (no text, no complex)",
            )
        shape = tuple(int(size) for size in proto.dims)
        if not is_sound_shape(shape):
            raise invalid("ONNX", self._source.name, name, f"shape {list(shape)}", "sizes of 0 or more")
        return StoredTensor(name, shape, element, stored_bytes(element, math.prod(shape)))

    def _require_size(self, stored: StoredTensor, num_bytes: int) -> None:
        if num_bytes != stored.num_bytes:
            expected = f"the {stored.num_bytes} of {stored.element}{list(stored.shape)}"
            raise invalid("ONNX", self._source.name, stored.name, f"{num_bytes} bytes", expected)

    def _typed(self, stored: StoredTensor, proto: Any) -> Array:
        """Values in the typed field of their kind; small types share int32_data, one entry each (4-bit: two)."""
        values = getattr(proto, _FIELD_OF.get(stored.element, "int32_data"))
        packed_nibbles = stored.element in ("U4", "I4")
        expected = stored.num_bytes if packed_nibbles else stored.num_elements
        if len(values) != expected:
            got = f"{len(values)} values"
            raise invalid("ONNX", self._source.name, stored.name, got, f"the {expected} of {list(stored.shape)}")
        if stored.element in ("F32", "F64", "I64", "U64"):
            kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U64": np.uint64}
            return np.array(values, kinds[stored.element]).reshape(stored.shape)
        wide = np.array(values, np.uint64 if stored.element == "U32" else np.int64)
        width = 1 if packed_nibbles else stored.num_bytes // max(1, stored.num_elements)
        signed = stored.element in ("I8", "I16", "I32")
        low, high = (-(1 << (8 * width - 1)), 1 << (8 * width - 1)) if signed else (0, 1 << (8 * width))
        if wide.size and not (low <= int(wide.min()) and int(wide.max()) < high):
            raise invalid("ONNX", self._source.name, stored.name, "a value beyond its type", f"{low} to {high - 1}")
        raw = wide.astype(f"<u{width}" if width else np.uint8).view(np.uint8)
        return unpacked(raw, stored.element, stored.shape)

    def _external(self, stored: StoredTensor, proto: Any) -> NDArray[np.uint8]:
        facts = {self._text(entry.key): self._text(entry.value) for entry in proto.external_data}
        offset, length = self._number(stored, facts, "offset", 0), self._number(stored, facts, "length", -1)
        file = FileBytes(self._external_path(stored, facts.get("location", "")))
        try:
            self._require_size(stored, file.size - offset if length < 0 else length)
            return file.array(offset, stored.num_bytes)
        finally:
            file.close()

    def _number(self, stored: StoredTensor, facts: dict[str, str], key: str, default: int) -> int:
        text = facts.get(key)
        if text is None:
            return default
        if not text.isascii() or not text.isdecimal() or len(text) > 19:
            raise invalid("ONNX", self._source.name, f"{stored.name}: {key}", text, "a number of bytes")
        return int(text)

    def _external_path(self, stored: StoredTensor, location: str) -> Path:
        """The file of external data, inside the model's directory whatever links it passes.  [WL-ONNX-4]"""
        field = f"{stored.name}: location"
        if self._directory is None:
            raise unsupported(
                "ONNX", self._source.name, field, location, "data inside a model that is not a local file"
            )
        parts = PurePosixPath(location).parts
        plain = bool(parts) and not any(mark in location for mark in ("\x00", "\\", ":"))
        if not plain or PurePosixPath(location).is_absolute() or ".." in parts:
            raise invalid("ONNX", self._source.name, field, location, "a relative path below the model's directory")
        try:
            root = self._directory.resolve()
            path = (root / location).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise invalid("ONNX", self._source.name, field, type(error).__name__, "a path") from None
        if not path.is_relative_to(root):
            raise invalid("ONNX", self._source.name, field, location, "a file inside the model's directory")
        return path


def parsed_model(source: ByteSource) -> Any:
    """The ModelProto in the bytes.  Raises UnsupportedError (no onnx package), InvalidFormatError.  [WL-ONNX-1]"""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
        from onnx import ModelProto
    except ImportError:
        raise UnsupportedError(
            f"read ONNX {source.name}: the onnx package is not installed; pip install 'ferrum-ref[onnx]'"
        ) from None
    if not 0 < source.size <= _MAX_MODEL_BYTES:
        raise invalid("ONNX", source.name, "file", f"{source.size} bytes", f"1 to {_MAX_MODEL_BYTES}")
    model = ModelProto()
    try:
        model.ParseFromString(source.read(0, source.size))
    except FerrumError:
        raise
    except DecodeError as error:
        raise invalid("ONNX", source.name, "message", quoted(str(error)), "a ModelProto") from None
    return model
