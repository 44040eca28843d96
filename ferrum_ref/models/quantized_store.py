"""A directory of quantised safetensors as a store of canonical `*.weight` matrices.

The tensors that make up one matrix are found by their endings, put together and checked on opening; what no matrix
claims is passed on under its own name, so that a stray one is refused like any other.
Clauses: MD-HFQ-3..8 (specs/model_files.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.models.checkpoint import TensorEntry
from ferrum_ref.models.quantized_config import QuantizationSettings
from ferrum_ref.models.quantized_parts import StoredParts, put_together

if TYPE_CHECKING:
    from ferrum_ref.models.hf_directory import SafetensorsStore

_WORDS: Final = ("qweight", "qzeros", "scales", "g_idx")
_SCALED: Final = ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point")
_COMPRESSED: Final = (*_SCALED, "weight_packed", "weight_shape", "weight_g_idx")
_OF_ACTIVATIONS: Final = ("input_scale", "input_zero_point", "activation_scale", "input_global_scale")
_QUANTISED: Final = ("F8_E4M3", "F8_E5M2", "I8")


class QuantizedStore:
    """The tensors of a directory, quantised ones as matrices.  [MD-HFQ-3]"""

    format = "safetensors"

    def __init__(self, store: SafetensorsStore, settings: QuantizationSettings, path: str) -> None:
        """Takes over the store.  Raises InvalidFormatError for a matrix whose tensors do not fit each other."""
        self._store = store
        self.settings = settings
        self._path = path
        endings = _WORDS if settings.method in ("gptq", "awq") else _COMPRESSED
        modules: dict[str, dict[str, TensorEntry]] = {}
        entries: dict[str, TensorEntry] = {}
        for name, entry in store.entries.items():
            module, _, ending = name.rpartition(".")
            if module and ending in endings:
                modules.setdefault(module, {})[ending] = entry
            elif not (module and ending in _OF_ACTIVATIONS):
                entries[name] = entry
        self._matrices: dict[str, QuantMatrix] = {}
        self._stored_names: dict[str, tuple[str, ...]] = {}
        for module, parts in modules.items():
            if set(parts) == {"weight"} and not _needs_scales(parts["weight"]):
                entries[f"{module}.weight"] = parts["weight"]
            else:
                entries[f"{module}.weight"] = self._matrix(module, parts, entries)
        for name in [f"{module}.bias" for module in modules if f"{module}.weight" in self._matrices]:
            if name in entries and not store.packed(name).any():
                del entries[name]  # some writers keep a bias of zeros where the model has none
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(entries)

    @property
    def num_bytes(self) -> int:
        return self._store.num_bytes

    def packed(self, name: str) -> NDArray[np.uint8]:
        """A plain tensor's bytes as stored."""
        return self._store.packed(name)

    def matrix(self, name: str) -> QuantMatrix | None:
        """The quantised matrix of this name, or a plain one as rows; None for tensors of another rank."""
        found = self._matrices.get(name)
        return found if found is not None else self._store.matrix(name)

    def release(self, name: str) -> None:
        """Let the pages of all the tensor's parts leave resident memory.  [MD-PACK-5]"""
        for stored in self._stored_names.get(name, (name,)):
            self._store.release(stored)

    def close(self) -> None:
        self._matrices.clear()
        self._store.close()

    def _matrix(self, module: str, parts: dict[str, TensorEntry], plain: Mapping[str, TensorEntry]) -> TensorEntry:
        name = f"{module}.weight"
        if name in plain:
            raise InvalidFormatError(
                f"open model {self._path}: tensor {name}: got shape {list(plain[name].shape)} beside "
                f"{module}.{next(iter(parts))} {list(next(iter(parts.values())).shape)}, expected one of the two"
            )
        matrix = put_together(StoredParts(self._path, module, parts, self._store.packed), self.settings)
        self._matrices[name] = matrix
        self._stored_names[name] = tuple(entry.name for entry in parts.values())
        return TensorEntry(name, matrix.shape, _label(matrix, self.settings), sum(e.num_bytes for e in parts.values()))


def _needs_scales(entry: TensorEntry) -> bool:
    return entry.dtype in _QUANTISED and len(entry.shape) == 2


def _label(matrix: QuantMatrix, settings: QuantizationSettings) -> str:
    if isinstance(matrix, RowMatrix):
        return matrix.format
    return f"GPTQ{settings.bits}" if matrix.kind == "gptq" else "AWQ4" if matrix.kind == "awq" else matrix.kind.upper()
