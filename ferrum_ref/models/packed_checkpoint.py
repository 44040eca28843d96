"""A checkpoint whose matrices can also be had as they are stored, and whose formats may need more than their bytes.

Clauses: MD-PACK-1, MD-HFQ-3, MD-HFQ-8 (specs/model_files.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ferrum_ref.errors import InvalidParameterError, NotFoundError, ShapeError
from ferrum_ref.kernels.quant import FORMATS
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.models.checkpoint import Checkpoint, GenerationDefaults, TensorEntry, TensorStore
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.quantized_config import QuantizationSettings

_FLOATS: Final = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
_BLOCK_ELEMENTS: Final = 1 << 20  # decoded at a time: 4 MB of float32


class PackedCheckpoint(Checkpoint):
    """A checkpoint over a store of packed matrices; `tensors` says the stored format of each.  [MD-PACK-1]"""

    def __init__(
        self,
        path: Path,
        config: DecoderConfig,
        store: TensorStore,
        generation: GenerationDefaults,
        quantization: QuantizationSettings | None = None,
    ) -> None:
        """`quantization`: what the configuration says of it.

        Raises InvalidFormatError unless the store holds exactly the tensors that `config` calls for.
        """
        super().__init__(path, config, _Dense(store), generation)
        self.quantization = quantization
        self._stored = store
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType({name: store.entries[name] for name in self.tensors})

    def read(self, name: str, dtype: DTypeLike = np.float32, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As `Checkpoint.read`; a matrix of several tensors is decoded a few rows at a time.  [MD-CKPT-4, MD-HFQ-3]"""
        entry = self.tensors.get(name)
        matrix = None if entry is None or entry.dtype in FORMATS else stored_matrix(self._stored, name)
        if entry is None or matrix is None:
            found = super().read(name, dtype, out)
            self.release(name)
            return found
        if dtype not in _FLOATS:
            expected = ", ".join(np.dtype(each).name for each in _FLOATS)
            raise InvalidParameterError(f"read tensor {name}: dtype: got {dtype!r}, expected one of {expected}")
        if out is None:
            out = np.empty(entry.shape, dtype)
        elif out.shape != entry.shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ShapeError(
                f"read tensor {name}: out: got {out.dtype}{list(out.shape)}, "
                f"expected C-contiguous {np.dtype(dtype).name}{list(entry.shape)}"
            )
        step = max(1, _BLOCK_ELEMENTS // (entry.shape[1] * matrix.row_step)) * matrix.row_step
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for start in range(0, entry.shape[0], step):
                stop = min(start + step, entry.shape[0])
                np.copyto(out[start:stop], matrix.rows(start, stop), casting="unsafe")
        self.release(name)
        return out

    def packed_matrix(self, name: str) -> QuantMatrix | None:
        """The matrix as it is stored, nothing decoded; None for a tensor of another rank.  [MD-PACK-1]

        Raises NotFoundError for an unknown name.
        """
        if name not in self.tensors:
            raise NotFoundError(f"read tensor {name!r}: no such tensor in {self.path}")
        return stored_matrix(self._stored, name)

    def release(self, name: str) -> None:
        """Let the tensor's pages of the file leave resident memory, where the store can; `read` does so itself.

        [MD-PACK-5]
        """
        if (give_back := getattr(self._stored, "release", None)) is not None:
            give_back(name)


def stored_matrix(store: TensorStore, name: str) -> QuantMatrix | None:
    """A matrix as a store has it: what the store's own `matrix` gives, or rows of plain numbers and blocks.  Pure."""
    own = getattr(store, "matrix", None)
    if own is not None:
        found: QuantMatrix | None = own(name)
        return found
    entry = store.entries[name]
    return RowMatrix(store.packed(name), entry.dtype) if len(entry.shape) == 2 and entry.dtype in FORMATS else None


class _Dense:
    """The store as one of plain tensors: a format that `kernels.quant` cannot decode alone counts as float32."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self.format = store.format
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(
            {name: self._plain(entry) for name, entry in store.entries.items()}
        )

    @property
    def num_bytes(self) -> int:
        return self._store.num_bytes

    def packed(self, name: str) -> NDArray[np.uint8]:
        """The bytes of the plain tensor: for a matrix of several tensors, of its decoded numbers."""
        matrix = None if self._store.entries[name].dtype in FORMATS else stored_matrix(self._store, name)
        if matrix is None:
            return self._store.packed(name)
        return matrix.rows(0, matrix.shape[0]).view(np.uint8)

    def close(self) -> None:
        self._store.close()

    def _plain(self, entry: TensorEntry) -> TensorEntry:
        if entry.dtype in FORMATS or stored_matrix(self._store, entry.name) is None:
            return entry
        return TensorEntry(entry.name, entry.shape, "F32", entry.num_elements * 4)
