"""What a PyTorch pickle says about tensors: storages, views on them, and the names they go by.

Clauses: WL-TORCH-1..5 (specs/weights.md).  Source: torch/_utils.py (`_rebuild_tensor*`), torch/serialization.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ferrum_ref.formats.complaint import invalid, unsupported
from ferrum_ref.formats.elements import ELEMENTS, MAX_DIMENSIONS, Array, StoredTensor, is_sound_shape
from ferrum_ref.formats.pickle_values import Global, PickleReader

_MAX_NESTING: Final = 32
_MAX_VALUES: Final = 500_000
_MAX_NAME_CHARACTERS: Final = 32 * 2**20
SINGLE: Final = "tensor"  # the name of a tensor that has none

STORAGES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "DoubleStorage": "F64",
        "FloatStorage": "F32",
        "HalfStorage": "F16",
        "BFloat16Storage": "BF16",
        "LongStorage": "I64",
        "IntStorage": "I32",
        "ShortStorage": "I16",
        "CharStorage": "I8",
        "ByteStorage": "U8",
        "BoolStorage": "BOOL",
        "UntypedStorage": "U8",
    }
)
_DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint64": "U64",
        "uint32": "U32",
        "uint16": "U16",
        "uint8": "U8",
        "bool": "BOOL",
    }
)
_REBUILD: Final = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements, stored under `key`."""

    key: str
    element: str
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ELEMENTS[self.element].itemsize


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: a strided window on a storage; strides and offset in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: str

    def stored(self, name: str) -> StoredTensor:
        return StoredTensor(name, self.shape, self.element, math.prod(self.shape) * ELEMENTS[self.element].itemsize)

    def values(self, raw: NDArray[np.uint8]) -> Array:
        """A C-contiguous copy of the window out of the storage's bytes."""
        dtype = ELEMENTS[self.element]
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        bits = np.dtype(f"u{dtype.itemsize}")  # numpy's stride tricks know no 8-bit floats
        flat = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(bits)[self.offset :]
        byte_strides = tuple(stride * flat.itemsize for stride in self.strides)
        copied: Array = np.array(as_strided(flat, self.shape, byte_strides, writeable=False), order="C")
        return copied.view(dtype)


class TorchValues:
    """Reads the pickles of one checkpoint.  [WL-TORCH-1..3]"""

    def __init__(self, source: str) -> None:
        self._source = source
        self.storages: dict[str, Storage] = {}

    def reader(self, data: bytes, offset: int = 0) -> PickleReader:
        return PickleReader(
            data,
            self._source,
            knows=_knows,
            reduce=self._reduce,
            persistent_load=self._storage,
            offset=offset,
        )

    def views(self, value: Any) -> dict[str, View]:
        """Every tensor of the checkpoint by name; the keys of nested dicts are joined with a dot.  [WL-TORCH-4]"""
        found: dict[str, View] = {}
        for name, view in self._walk(value):
            if name in found:
                raise invalid("PyTorch", self._source, "tensor", name, "each name once")
            found[name] = view
        return found

    def _walk(self, value: Any) -> Iterator[tuple[str, View]]:
        """Values by name, in order.  Shared and self-containing values cost no more than the limits below."""
        pending: list[tuple[str, Any, int]] = [("", value, 0)]
        num_values = num_characters = 0
        while pending:
            name, value, depth = pending.pop()
            if isinstance(value, View):
                yield name or SINGLE, value
            if not isinstance(value, (dict, list, tuple)):
                continue
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            num_values += len(items)
            num_characters += sum(len(key) if isinstance(key, str) else 1 for key, _ in items) + len(items) * len(name)
            if depth >= _MAX_NESTING or num_values > _MAX_VALUES or num_characters > _MAX_NAME_CHARACTERS:
                got = f"{num_values} values, {depth} levels deep"
                raise invalid(
                    "PyTorch", self._source, "nesting", got, f"at most {_MAX_VALUES} in {_MAX_NESTING} levels"
                )
            pending += [(f"{name}.{_key(key)}" if name else _key(key), item, depth + 1) for key, item in items][::-1]

    def _storage(self, identity: Any) -> Storage:
        """The persistent id ("storage", type, key, location, number of elements[, view])."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise invalid("PyTorch", self._source, "persistent id", type(identity).__name__, "a storage")
        kind, key, num_elements = identity[1], identity[2], identity[4]
        if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str):
            raise invalid("PyTorch", self._source, "storage", key, "a storage type and a text")
        if not _is_size(num_elements):
            raise invalid("PyTorch", self._source, f"storage {key}", num_elements, "a number of elements")
        if len(identity) == 6 and identity[5] is not None:
            raise unsupported("PyTorch", self._source, f"storage {key}", "a view on a storage", "whole storages")
        storage = Storage(key, STORAGES[kind.name], num_elements)
        known = self.storages.setdefault(key, storage)
        if known != storage:
            raise invalid("PyTorch", self._source, f"storage {key}", "two sizes or types", "one")
        return storage

    def _reduce(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        name = function.name
        if name in _REBUILD:
            return self._tensor(name, arguments)
        if name == "OrderedDict":
            return self._ordered(arguments)
        if name == "Size" and len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
            return tuple(arguments[0])
        if name == "device":
            return None
        if name == "encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
            return arguments[0].encode("latin-1")
        raise invalid("PyTorch", self._source, "call", name, "known arguments")

    def _ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        pairs = arguments[0] if len(arguments) == 1 else []
        if len(arguments) > 1 or not isinstance(pairs, list):
            raise invalid("PyTorch", self._source, "OrderedDict", "other arguments", "none, or a list of pairs")
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], (str, int)):
                raise invalid("PyTorch", self._source, "OrderedDict", type(pair).__name__, "pairs of name and value")
        return {pair[0]: pair[1] for pair in pairs}

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> View:
        if name == "_rebuild_parameter":
            if not arguments or not isinstance(arguments[0], View):
                raise invalid("PyTorch", self._source, "parameter", "something else", "a tensor")
            return arguments[0]
        if len(arguments) < 4 or not isinstance(arguments[0], Storage):
            raise invalid(
                "PyTorch", self._source, "tensor", f"{len(arguments)} arguments", "storage, offset, shape, strides"
            )
        storage, offset, shape, strides = arguments[:4]
        element = storage.element
        if name == "_rebuild_tensor_v3":
            dtype = arguments[6] if len(arguments) > 6 else None
            if not isinstance(dtype, Global) or dtype.name not in _DTYPES:
                raise unsupported("PyTorch", self._source, "tensor", "an unknown dtype", f"one of {', '.join(_DTYPES)}")
            element = _DTYPES[dtype.name]
        view = View(storage, offset, *self._window(shape, strides), element)
        self._check_bounds(view)
        return view

    def _window(self, shape: Any, strides: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for what, sizes in (("shape", shape), ("strides", strides)):
            if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS or not all(map(_is_size, sizes)):
                raise invalid("PyTorch", self._source, what, type(sizes).__name__, f"up to {MAX_DIMENSIONS} sizes")
        if len(shape) != len(strides) or not is_sound_shape(shape):
            raise invalid(
                "PyTorch", self._source, "shape", f"{shape!r:.80}", f"{len(strides)} sizes that fit in memory"
            )
        return tuple(shape), tuple(strides)

    def _check_bounds(self, view: View) -> None:
        """The window lies inside its storage.  [WL-TORCH-3]"""
        if not _is_size(view.offset):
            raise invalid("PyTorch", self._source, "offset", type(view.offset).__name__, "a number of elements")
        last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        available = view.storage.num_bytes // ELEMENTS[view.element].itemsize
        if 0 not in view.shape and last >= available:
            got = f"elements up to {last} of storage {view.storage.key}"
            raise invalid("PyTorch", self._source, "tensor", got, f"at most the {available} it has")


def _knows(found: Global) -> bool:
    match found.module:
        case "torch._utils":
            return found.name in _REBUILD
        case "collections":
            return found.name == "OrderedDict"
        case "_codecs":
            return found.name == "encode"
        case "torch":
            return found.name in ("Size", "device") or found.name in STORAGES or found.name in _DTYPES
        case "torch.storage":
            return found.name == "UntypedStorage"
    return False


def _key(key: Any) -> str:
    return key if isinstance(key, str) else f"{key!r:.100}"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
