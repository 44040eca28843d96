"""PyTorch checkpoints, weights only: the zip container of torch 1.6 and later, and the older stream of pickles.

    zip     <archive>/data.pkl, <archive>/data/<key> (stored, little-endian), <archive>/byteorder
    stream  pickles: magic number, protocol 1001, system facts, the value, the list of storage keys;
            then per key a number of elements (i64) and the elements

Neither needs torch, and nothing in the file is executed.  Clauses: WL-TORCH-1..6 (specs/weights.md).
Source: torch/serialization.py.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import NotFoundError, ResourceExhaustedError
from ferrum_ref.formats import zip_entries
from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.formats.complaint import invalid, unsupported
from ferrum_ref.formats.elements import Array, StoredTensor
from ferrum_ref.formats.pickle_values import MAX_STREAM_BYTES
from ferrum_ref.formats.pytorch_values import Storage, TorchValues, View
from ferrum_ref.formats.zip_entries import ZipEntries

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_PICKLE: Final = "/data.pkl"


class PyTorchFile:
    """An open checkpoint; `tensors` by name.  Safe for concurrent reads.  [WL-TORCH-1]"""

    def __init__(self, source: ByteSource) -> None:
        """Raises InvalidFormatError, UnsupportedError."""
        self._source = source
        self._zip: ZipEntries | None = None
        self._folder = ""
        self._offsets: dict[str, int] = {}
        is_zip = source.size >= 4 and source.read(0, 4) == zip_entries.MAGIC
        self._views = self._open_zip() if is_zip else self._open_legacy()
        self.tensors: dict[str, StoredTensor] = {name: view.stored(name) for name, view in self._views.items()}

    def read(self, name: str, limit_bytes: int) -> Array:
        """The tensor's values, C-contiguous.  Raises NotFoundError, InvalidFormatError, ResourceExhaustedError."""
        if name not in self._views:
            raise NotFoundError(f"read PyTorch {self._source.name}: tensor {name!a:.100}: got no such name")
        view = self._views[name]
        num_bytes = max(self.tensors[name].num_bytes, view.storage.num_bytes)
        if num_bytes > limit_bytes:
            raise ResourceExhaustedError(
                f"read PyTorch {self._source.name}: tensor {name!a:.100}: got {num_bytes} bytes, "
                f"expected at most {limit_bytes}; raise the loader's max_tensor_bytes"
            )
        return view.values(self._storage_bytes(view.storage))

    def _storage_bytes(self, storage: Storage) -> NDArray[np.uint8]:
        if self._zip is None:
            return self._source.array(self._offsets[storage.key], storage.num_bytes)
        name = f"{self._folder}/data/{storage.key}"
        return self._zip.read(name, storage.num_bytes, may_deflate=False)

    def _open_zip(self) -> dict[str, View]:
        self._zip = ZipEntries(self._source, "PyTorch")
        found = [name for name in self._zip.names if name.endswith(_PICKLE) and name.count("/") == 1]
        if len(found) != 1:
            raise invalid("PyTorch", self._source.name, "archive", f"{len(found)} files data.pkl", "one")
        self._folder = found[0].removesuffix(_PICKLE)
        if f"{self._folder}/constants.pkl" in self._zip.names:
            expected = "a state dict; save model.state_dict() instead of a script"
            raise unsupported("PyTorch", self._source.name, "archive", "a TorchScript program", expected)
        order = f"{self._folder}/byteorder"
        if order in self._zip.names and self._zip.prefix(order, 16) != b"little":
            raise unsupported("PyTorch", self._source.name, order, "another byte order", "little")
        values = TorchValues(self._source.name)
        stream = self._zip.read(found[0], MAX_STREAM_BYTES, may_deflate=False).tobytes()
        views = values.views(values.reader(stream).load())
        for storage in values.storages.values():
            size = self._zip.num_bytes(f"{self._folder}/data/{storage.key}", may_deflate=False)
            if size != storage.num_bytes:
                expected = f"the {storage.num_bytes} that the tensors need"
                raise invalid("PyTorch", self._source.name, f"storage {storage.key}", f"{size} bytes", expected)
        return views

    def _open_legacy(self) -> dict[str, View]:
        """The stream of pickles; the storages follow in the order of the key list.  [WL-TORCH-6]"""
        name, values = self._source.name, TorchValues(self._source.name)
        reader = values.reader(self._source.read(0, min(self._source.size, MAX_STREAM_BYTES)))
        if self._source.size == 0 or self._source.read(0, 1) != b"\x80" or reader.load() != _LEGACY_MAGIC:
            raise invalid("PyTorch", name, "magic", "something else", "a zip archive or torch's magic number")
        protocol, system = reader.load(), reader.load()
        if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
            raise invalid("PyTorch", name, "protocol", type(protocol).__name__, str(_LEGACY_PROTOCOL))
        if system.get("little_endian") is not True:
            raise unsupported("PyTorch", name, "byte order", "not little-endian", "little-endian")
        views = values.views(reader.load())
        keys = reader.load()
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in values.storages for key in keys):
            raise invalid("PyTorch", name, "storage keys", type(keys).__name__, "the storages that the tensors name")
        offset = reader.offset
        for key in keys:
            storage = values.storages[key]
            declared = int.from_bytes(self._source.read(offset, 8), "little", signed=True)
            if declared != storage.num_elements or offset + 8 + storage.num_bytes > self._source.size:
                expected = f"{storage.num_elements}, and its bytes within the file"
                raise invalid("PyTorch", name, f"storage {key}", f"{declared} elements", expected)
            self._offsets[key] = offset + 8
            offset += 8 + storage.num_bytes
        if missing := [view.storage.key for view in views.values() if view.storage.key not in self._offsets]:
            raise invalid("PyTorch", name, f"storage {missing[0]}", "nothing", "its bytes in the file")
        return views
