"""The tensors of a GGUF file with experts, under the canonical names and in their orientation.

Experts lie in stacks `[n, out, in]`. Mixtral's q and k rows are permuted as any Llama's; deepseek2 may hold the
latent's expansion as attn_k_b `[H, C, Dn]` and attn_v_b `[H, Dv, C]`, which together are `kv_b_proj`.
Clauses: MD-MOEGGUF-2, MD-MOEGGUF-3 (specs/decoder_families.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.formats.gguf import GgufFile
from ferrum_ref.kernels.quant import decode
from ferrum_ref.models.checkpoint import GenerationDefaults, TensorEntry
from ferrum_ref.models.config import quoted
from ferrum_ref.models.experts_store import ExpertStore
from ferrum_ref.models.moe_gguf import read_moe_gguf
from ferrum_ref.models.packed_checkpoint import PackedCheckpoint

if TYPE_CHECKING:
    from ferrum_ref.models.config import DecoderConfig

Bytes = NDArray[np.uint8]
_OUTER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_LAYER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.gate_proj",
        "ffn_up_exps": "mlp.experts.up_proj",
        "ffn_down_exps": "mlp.experts.down_proj",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }
)
_WHOLE: Final[Mapping[str, str]] = MappingProxyType(
    {"attn_sinks.weight": "self_attn.sinks", "exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
)
_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(([a-z_]+)\.(weight|bias))")
_PERMUTED: Final = re.compile(r".*\.self_attn\.(q|k)_proj\.(weight|bias)")
_KEY_PART: Final = re.compile(r"blk\.(\d+)\.attn_k_b\.weight")
_VALUE_PART: Final = "blk.{}.attn_v_b.weight"


class MoeGgufStore:
    """Stacks and plain tensors of one file; wrap it with `experts_of_gguf`."""

    format = "gguf"

    def __init__(self, file: GgufFile, config: DecoderConfig) -> None:
        """Raises InvalidFormatError on a tensor that none of these families has, or on half an expansion."""
        self._file = file
        self._heads = {"q": config.num_heads, "k": config.num_kv_heads} if config.architecture == "mixtral" else {}
        self._readers: dict[str, Callable[[], Bytes]] = {}
        self._stored_names: dict[str, str] = {}
        entries: dict[str, TensorEntry] = {}
        for stored in file.tensors:
            if match := _KEY_PART.fullmatch(stored):
                entry, reader = self._expansion(stored, int(match[1]))
            elif stored.endswith(".attn_v_b.weight"):
                continue
            else:
                entry, reader = self._plain(stored, _canonical(file, stored))
            if entry.name in entries:
                raise InvalidFormatError(f"read GGUF {file.path}: tensor {quoted(stored)}: got {entry.name} again")
            entries[entry.name], self._readers[entry.name] = entry, reader
            self._stored_names[entry.name] = stored
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(entries)

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes

    def packed(self, name: str) -> Bytes:
        return self._readers[name]()

    def release(self, name: str) -> None:
        """Let the tensor's pages leave resident memory."""
        self._file.release(self._stored_names[name])

    def close(self) -> None:
        self._file.close()

    def _plain(self, stored: str, name: str) -> tuple[TensorEntry, Callable[[], Bytes]]:
        tensor = self._file.tensors[stored]
        entry = TensorEntry(name, tensor.shape, tensor.type_label, tensor.num_bytes)
        match = _PERMUTED.fullmatch(name)
        heads = self._heads.get(match[1], 0) if match else 0
        return entry, lambda: self._rows(stored, heads)

    def _rows(self, stored: str, heads: int) -> Bytes:
        shape = self._file.tensors[stored].shape
        raw = self._file.packed(stored)
        if heads:
            raw = raw.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2)
        return raw.reshape(*shape[:-1], -1)

    def _expansion(self, stored: str, layer: int) -> tuple[TensorEntry, Callable[[], Bytes]]:
        """[U_h; V_h] of every head from attn_k_b and attn_v_b, as float32.  [MD-MOEGGUF-3]"""
        other = _VALUE_PART.format(layer)
        key, value = self._file.tensors[stored], self._file.tensors.get(other)
        fits = value is not None and len(key.shape) == len(value.shape) == 3
        if value is None or not fits or (key.shape[0], key.shape[1]) != (value.shape[0], value.shape[2]):
            found = "nothing" if value is None else list(value.shape)
            raise InvalidFormatError(
                f"read GGUF {self._file.path}: tensor {other}: got {found}, "
                f"expected [{key.shape[0]}, values, {key.shape[1]}] beside {stored} {list(key.shape)}"
            )
        heads, rank = key.shape[0], key.shape[1]
        rows = heads * (key.shape[2] + value.shape[1])
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"

        def read() -> Bytes:
            up = decode(key.type_label, self._rows(stored, 0)).swapaxes(1, 2)
            down = decode(value.type_label, self._rows(other, 0))
            return np.concatenate([up, down], axis=1).reshape(rows, rank).view(np.uint8)

        return TensorEntry(name, (rows, rank), "F32", key.num_bytes + value.num_bytes), read


def open_moe_gguf(file: GgufFile) -> PackedCheckpoint:
    """The model of an open file, which the checkpoint takes over.  [MD-MOEGGUF-1..3]

    Raises InvalidFormatError, UnsupportedError; the file stays open then.
    """
    source = f"GGUF {file.path}"
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    config = read_moe_gguf(file.metadata, shapes, source)
    generation = GenerationDefaults(config.eos_token_ids, config.bos_token_id, config.pad_token_id)
    return PackedCheckpoint(file.path, config, experts_of_gguf(file, config), generation)


def experts_of_gguf(file: GgufFile, config: DecoderConfig) -> ExpertStore:
    """The file's tensors under canonical names, experts one by one.  [MD-MOEGGUF-2]  Raises InvalidFormatError."""
    return ExpertStore(MoeGgufStore(file, config))


def _canonical(file: GgufFile, stored: str) -> str:
    if stored in _OUTER:
        return _OUTER[stored]
    match = _BLOCK.fullmatch(stored)
    if match is not None and match[2] in _WHOLE:
        return f"model.layers.{match[1]}.{_WHOLE[match[2]]}"
    if match is None or match[3] not in _LAYER:
        raise InvalidFormatError(f"read GGUF {file.path}: tensor {quoted(stored)}: got a name that no such model has")
    return f"model.layers.{match[1]}.{_LAYER[match[3]]}.{match[4]}"
