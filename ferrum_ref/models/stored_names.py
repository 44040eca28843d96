"""Tensors of a Hugging Face directory under their family's canonical names, where older files call them otherwise.

Clause: MD-NAMES-3 (specs/model_files.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.kernels.quant import FORMATS
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.models.config import DecoderConfig, quoted

if TYPE_CHECKING:
    from ferrum_ref.models.checkpoint import TensorEntry, TensorStore


class RenamedStore:
    """A store under other names; what is renamed to None is left out."""

    def __init__(self, store: TensorStore, rename: Callable[[str], str | None]) -> None:
        """Raises InvalidFormatError when two tensors come to have one name."""
        self._store = store
        self._stored: dict[str, str] = {}
        entries: dict[str, TensorEntry] = {}
        for stored, entry in store.entries.items():
            name = rename(stored)
            if name is None:
                continue
            if name in entries:
                raise InvalidFormatError(
                    f"read tensors: {quoted(stored)}: got it beside {quoted(self._stored[name])}, expected one of them"
                )
            self._stored[name] = stored
            entries[name] = entry if name == stored else replace(entry, name=name)
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(entries)

    @property
    def format(self) -> str:
        return self._store.format

    @property
    def num_bytes(self) -> int:
        return self._store.num_bytes

    def packed(self, name: str) -> NDArray[np.uint8]:
        return self._store.packed(self._stored[name])

    def matrix(self, name: str) -> QuantMatrix | None:
        """The stored form of a matrix; None for a tensor of another rank or format."""
        own = getattr(self._store, "matrix", None)
        if own is not None:
            found: QuantMatrix | None = own(self._stored[name])
            return found
        entry = self.entries[name]
        if len(entry.shape) != 2 or entry.dtype not in FORMATS:
            return None
        return RowMatrix(self.packed(name), entry.dtype)

    def close(self) -> None:
        self._store.close()


def renamed_store(
    *prefixes: tuple[str, str | None], unused: str = r"(?!)"
) -> Callable[[TensorStore, DecoderConfig], TensorStore]:
    """A `Family.store`: the first matching prefix is replaced, or with None left out, as is what matches `unused`."""
    pattern = re.compile(unused)

    def rename(stored: str) -> str | None:
        name: str | None = stored
        for theirs, ours in prefixes:
            if stored.startswith(theirs):
                name = None if ours is None else ours + stored.removeprefix(theirs)
                break
        return None if name is None or pattern.fullmatch(name) else name

    def wrap(store: TensorStore, _config: DecoderConfig) -> TensorStore:
        if all(rename(name) == name for name in store.entries):
            return store
        return RenamedStore(store, rename)

    return wrap
