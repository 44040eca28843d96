"""A GGUF file as a store of canonically named tensors.

llama.cpp stores the rows of q and k so that rotary pairs are adjacent; Hugging Face keeps the halves of a head apart.
With w of H heads of D rows, stored[h, i, j] = w[h, j, i] for i < D/2, j < 2; `packed` undoes it on the packed rows,
before decoding.  Clauses: MD-GGUF-8, MD-NAMES-2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.formats.gguf import GgufFile
from ferrum_ref.kernels.quant import FORMATS
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.models.checkpoint import GenerationDefaults, TensorEntry
from ferrum_ref.models.config import DecoderConfig, quoted
from ferrum_ref.models.config_gguf import gguf_eos_token_ids
from ferrum_ref.models.moe_gguf import is_moe_gguf
from ferrum_ref.models.moe_gguf_store import open_moe_gguf
from ferrum_ref.models.packed_checkpoint import PackedCheckpoint
from ferrum_ref.models.tensor_names_gguf import canonical_gguf_name, has_permuted_rows

_PERMUTED: Final = re.compile(r".*\.self_attn\.(q|k)_proj\.(weight|bias)")
_BLOCK_FORMATS: Final = frozenset(name for name, layout in FORMATS.items() if layout.block_elements > 1)
_QUANTIZATION_VERSION: Final = 2


class GgufStore:
    """The tensors of one file under canonical names."""

    format = "gguf"

    def __init__(self, file: GgufFile, config: DecoderConfig) -> None:
        """Raises InvalidFormatError on a tensor that the architecture does not have."""
        self._file = file
        self._is_permuted = has_permuted_rows(config)
        self._heads = {"q": config.num_heads, "k": config.num_kv_heads}
        stored_names: dict[str, str] = {}
        for stored in file.tensors:
            name = canonical_gguf_name(stored, config)
            if name is None:
                raise InvalidFormatError(
                    f"read GGUF {file.path}: tensor {quoted(stored)}: got a name that no {config.architecture} has"
                )
            stored_names[name] = stored
        self._stored_names = stored_names
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(
            {
                name: TensorEntry(name, tensor.shape, tensor.type_label, tensor.num_bytes)
                for name, tensor in ((name, file.tensors[stored]) for name, stored in stored_names.items())
            }
        )

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes

    def packed(self, name: str) -> NDArray[np.uint8]:
        """Packed bytes with the tensor's leading dimensions; rows of q and k in Hugging Face's order."""
        entry = self.entries[name]
        raw = self._file.packed(self._stored_names[name])
        match = _PERMUTED.fullmatch(name) if self._is_permuted else None
        if match:
            rows = entry.shape[0]
            heads = self._heads[match[1]]
            raw = raw.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2)
        return raw.reshape(*entry.shape[:-1], -1)

    def matrix(self, name: str) -> QuantMatrix | None:
        """A matrix as rows of the file (q and k copied into canonical order); None for another rank or format."""
        entry = self.entries[name]
        if len(entry.shape) != 2 or entry.dtype not in FORMATS:
            return None
        return RowMatrix(self.packed(name), entry.dtype)

    def release(self, name: str) -> None:
        """Let the tensor's pages leave resident memory.  [MD-PACK-5]"""
        self._file.release(self._stored_names[name])

    def close(self) -> None:
        self._file.close()


def open_gguf_checkpoint(path: Path) -> PackedCheckpoint:
    """See open_checkpoint."""
    file = GgufFile(path)
    try:
        _check_quantization_version(file)
        if is_moe_gguf(file.metadata):
            return open_moe_gguf(file)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        config = DecoderConfig.from_gguf(file.metadata, shapes, source=f"GGUF {path}")
        generation = GenerationDefaults(gguf_eos_token_ids(file.metadata), config.bos_token_id, config.pad_token_id)
        return PackedCheckpoint(path, config, GgufStore(file, config), generation)
    except ConfigError as error:
        file.close()
        raise InvalidFormatError(f"read GGUF {path}: {error.message}") from None
    except BaseException:
        file.close()
        raise


def _check_quantization_version(file: GgufFile) -> None:
    """Raises UnsupportedError for blocks of another generation of ggml's formats."""
    version = file.metadata.get("general.quantization_version", _QUANTIZATION_VERSION)
    has_blocks = any(tensor.type_label in _BLOCK_FORMATS for tensor in file.tensors.values())
    if has_blocks and not (isinstance(version, int) and version == _QUANTIZATION_VERSION):
        raise UnsupportedError(
            f"read GGUF {file.path}: general.quantization_version: got {quoted(version)}, "
            f"expected {_QUANTIZATION_VERSION}"
        )
