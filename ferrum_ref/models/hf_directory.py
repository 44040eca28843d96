"""A Hugging Face model directory as a store of tensors: config.json and one or several safetensors files.

    config.json   generation_config.json (optional)
    model.safetensors                     or
    model.safetensors.index.json  {"weight_map": {tensor: file}}  with model-00001-of-0000N.safetensors ...

Quantised weights (`quantization_config`) come out as matrices under their canonical names: see quantized_store.
Clauses: MD-DIR-1..4, MD-HFQ-1 (specs/model_files.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ConfigError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.formats.safetensors import SafetensorsFile
from ferrum_ref.kernels.quant import FORMATS
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.models.checkpoint import GenerationDefaults, TensorEntry
from ferrum_ref.models.config import DecoderConfig, quoted
from ferrum_ref.models.config_hf import one_token_id, token_ids
from ferrum_ref.models.packed_checkpoint import PackedCheckpoint
from ferrum_ref.models.quantized_config import quantization_settings
from ferrum_ref.models.quantized_store import QuantizedStore
from ferrum_ref.models.tensor_names import family_of

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_IGNORED: Final = re.compile(r".*\.self_attn\.rotary_emb\.inv_freq")  # a table that older checkpoints store


class SafetensorsStore:
    """The tensors of one or several files under their own names.  [MD-DIR-1]"""

    format = "safetensors"

    def __init__(self, files: tuple[SafetensorsFile, ...]) -> None:
        """Raises InvalidFormatError when two files hold a tensor of one name."""
        owners: dict[str, SafetensorsFile] = {}
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if _IGNORED.fullmatch(name):
                    continue
                if name in owners:
                    raise InvalidFormatError(
                        f"read safetensors {file.path}: tensor {quoted(name)}: got it again, "
                        f"expected it only in {owners[name].path.name}"
                    )
                owners[name] = file
                entries[name] = TensorEntry(name, tensor.shape, tensor.dtype, tensor.num_bytes)
        self._files = files
        self._owners = owners
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(entries)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self._files)

    def packed(self, name: str) -> NDArray[np.uint8]:
        return self._owners[name].packed(name)

    def matrix(self, name: str) -> QuantMatrix | None:
        """A matrix of plain numbers as rows of its file; None for another rank or element type."""
        entry = self.entries[name]
        if len(entry.shape) != 2 or entry.dtype not in FORMATS:
            return None
        return RowMatrix(self.packed(name), entry.dtype)

    def release(self, name: str) -> None:
        """Let the tensor's pages leave resident memory.  [MD-PACK-5]"""
        self._owners[name].release(name)

    def close(self) -> None:
        for file in self._files:
            file.close()


def open_hf_checkpoint(directory: Path) -> PackedCheckpoint:
    """See open_checkpoint.  [MD-DIR-1..4, MD-HFQ-1]"""
    source = directory / "config.json"
    given = read_json_object(source)
    settings = quantization_settings(given, str(source))
    plain = {key: value for key, value in given.items() if key != "quantization_config"}
    config = DecoderConfig.from_hf(plain, source=str(source))
    generation = _generation(directory, config)
    store: SafetensorsStore | QuantizedStore = open_safetensors(directory)
    try:
        if settings is not None and isinstance(store, SafetensorsStore):
            store = QuantizedStore(store, settings, str(directory))
        return PackedCheckpoint(directory, config, family_of(config).store(store, config), generation, settings)
    except BaseException:
        store.close()
        raise


def open_safetensors(directory: Path) -> SafetensorsStore:
    """All tensors of a directory's weight files; the caller closes them.  [MD-DIR-1, MD-DIR-2]"""
    files: list[SafetensorsFile] = []
    try:
        for path, promised in _shards(directory):
            file = SafetensorsFile(path)
            files.append(file)
            for name in promised:
                if name not in file.tensors:
                    raise InvalidFormatError(
                        f"read safetensors {path}: tensor {quoted(name)}: got nothing, expected it as {_INDEX} says"
                    )
        return SafetensorsStore(tuple(files))
    except BaseException:
        for file in files:
            file.close()
        raise


def _shards(directory: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Each weight file with the tensors that the index promises for it.  [MD-DIR-2]"""
    index_path = directory / _INDEX
    if not index_path.exists():
        single = directory / _SINGLE
        if not single.exists():
            raise NotFoundError(
                f"open model {directory}: got neither {_SINGLE} nor {_INDEX}; weights in other formats are not read"
            )
        return [(single, ())]
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidFormatError(f"read {index_path}: weight_map: got {quoted(weight_map)}, expected tensor -> file")
    promised: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or "\x00" in file_name:
            raise InvalidFormatError(
                f"read {index_path}: weight_map[{quoted(name)}]: got {quoted(file_name)}, expected a plain file name"
            )
        promised.setdefault(file_name, []).append(name)
    for file_name in promised:
        if not (directory / file_name).exists():
            raise InvalidFormatError(
                f"open model {directory}: shard {quoted(file_name)}: got no such file; get it again"
            )
    return [(directory / file_name, tuple(names)) for file_name, names in promised.items()]


def _generation(directory: Path, config: DecoderConfig) -> GenerationDefaults:
    """generation_config.json where it speaks, config.json elsewhere.  [MD-DIR-4; D-28]"""
    path = directory / "generation_config.json"
    given: dict[str, Any] = read_json_object(path) if path.exists() else {}
    try:
        eos = token_ids(given.get("eos_token_id"), "eos_token_id")
        bos = one_token_id(given.get("bos_token_id"), "bos_token_id")
        pad = one_token_id(given.get("pad_token_id"), "pad_token_id")
    except ConfigError as error:
        raise InvalidFormatError(f"read {path}: {error.message}") from None
    return GenerationDefaults(
        eos_token_ids=eos or config.eos_token_ids,
        bos_token_id=config.bos_token_id if bos is None else bos,
        pad_token_id=config.pad_token_id if pad is None else pad,
    )
