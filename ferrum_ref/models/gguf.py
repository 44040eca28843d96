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
from ferrum_ref.models.checkpoint import Checkpoint, GenerationDefaults, TensorEntry
from ferrum_ref.models.config import DecoderConfig, quoted
from ferrum_ref.models.config_gguf import gguf_eos_token_ids
from ferrum_ref.models.tensor_names import canonical_name

_PERMUTED: Final = re.compile(r".*\.self_attn\.(q|k)_proj\.(weight|bias)")
_BLOCK_FORMATS: Final = ("Q4_0", "Q4_1", "Q8_0")
_QUANTIZATION_VERSION: Final = 2


class GgufStore:
    """The tensors of one file under canonical names."""

    format = "gguf"

    def __init__(self, file: GgufFile, config: DecoderConfig) -> None:
        """Raises InvalidFormatError on a tensor that architecture "llama" does not have."""
        self._file = file
        self._heads = {"q": config.num_heads, "k": config.num_kv_heads}
        stored_names: dict[str, str] = {}
        for stored in file.tensors:
            name = canonical_name(stored)
            if name is None:
                raise InvalidFormatError(
                    f"read GGUF {file.path}: tensor {quoted(stored)}: got a name that no Llama has"
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
        match = _PERMUTED.fullmatch(name)
        if match:
            rows = entry.shape[0]
            heads = self._heads[match[1]]
            raw = raw.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2)
        return raw.reshape(*entry.shape[:-1], -1)

    def close(self) -> None:
        self._file.close()


def open_gguf_checkpoint(path: Path) -> Checkpoint:
    """See open_checkpoint."""
    file = GgufFile(path)
    try:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        config = DecoderConfig.from_gguf(file.metadata, shapes, source=f"GGUF {path}")
        version = file.metadata.get("general.quantization_version", _QUANTIZATION_VERSION)
        has_blocks = any(tensor.type_label in _BLOCK_FORMATS for tensor in file.tensors.values())
        if has_blocks and not (isinstance(version, int) and version == _QUANTIZATION_VERSION):
            raise UnsupportedError(
                f"read GGUF {path}: general.quantization_version: got {quoted(version)}, "
                f"expected {_QUANTIZATION_VERSION}"
            )
        generation = GenerationDefaults(gguf_eos_token_ids(file.metadata), config.bos_token_id, config.pad_token_id)
        return Checkpoint(path, config, GgufStore(file, config), generation)
    except ConfigError as error:
        file.close()
        raise InvalidFormatError(f"read GGUF {path}: {error.message}") from None
    except BaseException:
        file.close()
        raise
