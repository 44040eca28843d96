"""GGUF metadata of architecture "llama" -> DecoderConfig.  Clause: MD-CONFIG-3 (specs/model_files.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DEFAULT_ROPE_THETA, DecoderConfig, quoted

# Keys under "llama." that change the logits: name -> the values that leave a Llama as it is.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "attention.clamp_kqv": (None, 0),
        "attention.max_alibi_bias": (None, 0),
        "attention.scale": (None, 0),
        "attention.sliding_window": (None, 0),
        "embedding_scale": (None, 0, 1),
        "expert_count": (None, 0),
        "final_logit_softcapping": (None, 0),
        "logit_scale": (None, 0, 1),
        "residual_scale": (None, 0, 1),
        "rope.scaling.factor": (None, 0, 1),
        "rope.scaling.type": (None, "none"),
        "rope.scale_linear": (None, 0, 1),
        "use_parallel_residual": (None, False),
    }
)
_FOREIGN_TENSORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], source: str) -> DecoderConfig:
    """See DecoderConfig.from_gguf."""
    metadata = _scalars(metadata, source)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"read {source}: general.architecture: got {quoted(architecture)}, expected 'llama'")
    _refuse_foreign(metadata, tensors, source)
    try:
        return _build(metadata, tensors, source)
    except ConfigError as error:
        raise InvalidFormatError(f"read {source}: {error.message}") from None


def _build(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], source: str) -> DecoderConfig:
    hidden_size = _size(metadata, "llama.embedding_length")
    num_heads = _size(metadata, "llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length")
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(f"llama.embedding_length: got {hidden_size}, expected a multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise UnsupportedError(f"read {source}: {key}: got {quoted(metadata[key])}, expected head_dim {head_dim}")
    return DecoderConfig(
        vocab_size=_vocab_size(metadata, tensors),
        hidden_size=hidden_size,
        intermediate_size=_size(metadata, "llama.feed_forward_length"),
        num_layers=_size(metadata, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=_size(metadata, "llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=_size(metadata, "llama.context_length"),
        rms_norm_eps=_need(metadata, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.get("llama.rope.freq_base", DEFAULT_ROPE_THETA),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        eos_token_ids=gguf_eos_token_ids(metadata),
        bos_token_id=_token_id(metadata, "tokenizer.ggml.bos_token_id"),
        pad_token_id=_token_id(metadata, "tokenizer.ggml.padding_token_id"),
    )


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text or a turn: eos, eot and eom, in that order, without repeats.  Raises ConfigError."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found = [_token_id(metadata, key) for key in keys]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _refuse_foreign(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], source: str) -> None:
    for field, neutral in _NEUTRAL.items():
        key = f"llama.{field}"
        if metadata.get(key) not in neutral:
            raise UnsupportedError(f"read {source}: {key}: got {quoted(metadata[key])}, expected it absent")
    for name in _FOREIGN_TENSORS:
        if name in tensors:
            raise UnsupportedError(f"read {source}: tensor {name}: got scaled rotary positions, expected plain ones")
    if metadata.get("split.count", 1) not in (0, 1):
        found = metadata["split.count"]
        raise UnsupportedError(
            f"read {source}: split.count: got {quoted(found)} files, expected one; merge them with gguf-split --merge"
        )


def _scalars(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Metadata without its arrays; one of the architecture's own keys must not be an array (one value per layer)."""
    scalars = {key: value for key, value in metadata.items() if isinstance(value, (bool, int, float, str))}
    for key in metadata:
        if key.startswith("llama.") and key not in scalars:
            raise UnsupportedError(f"read {source}: {quoted(key)}: got an array, expected one value for all layers")
    return scalars


def _vocab_size(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ConfigError(f"tensor token_embd.weight: got {embedding}, expected a matrix of vocabulary x hidden size")
    declared = metadata.get("llama.vocab_size", embedding[0])
    if declared != embedding[0]:
        raise ConfigError(f"llama.vocab_size: got {quoted(declared)}, but token_embd.weight has {embedding[0]} rows")
    return embedding[0]


def _need(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ConfigError(f"{key}: got nothing, expected a value")
    return metadata[key]


def _size(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default) if default is not None else _need(metadata, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: got {quoted(value)}, expected a positive integer")
    return value


def _token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if value is None or (isinstance(value, int) and value == 2**32 - 1):  # the type's largest id: not set
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"{key}: got {quoted(value)}, expected a token id")
    return value
