"""config.json of Hugging Face -> DecoderConfig.  Clause: MD-CONFIG-2 (specs/model_files.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DEFAULT_ROPE_THETA, DecoderConfig, quoted

# Fields that change the logits in some relative of Llama: name -> the values that leave a Llama as it is.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "add_cross_attention": (None, False),
        "attention_multiplier": (None,),
        "attn_logit_softcapping": (None,),
        "clip_qkv": (None,),
        "embedding_multiplier": (None, 1),
        "final_logit_softcapping": (None,),
        "is_encoder_decoder": (None, False),
        "logit_scale": (None, 1),
        "logits_scaling": (None, 1),
        "no_rope_layers": (None, []),
        "num_experts": (None, 0),
        "num_local_experts": (None, 0),
        "partial_rotary_factor": (None, 1),
        "qk_norm": (None, False),
        "quantization_config": (None,),
        "query_pre_attn_scalar": (None,),
        "residual_multiplier": (None, 1),
        "rope_interleaved": (None, False),
        "sliding_window": (None,),
        "use_qk_norm": (None, False),
    }
)
_ACTIVATIONS: Final = ("silu", "swish")
_PLAIN_ROPE: Final = (None, "default")


def read_hf_config(config: Mapping[str, Any], source: str) -> DecoderConfig:
    """See DecoderConfig.from_hf."""
    if not isinstance(config, Mapping):
        raise InvalidFormatError(f"read {source}: got {type(config).__name__}, expected a JSON object")
    _refuse_foreign(config, source)
    try:
        return _build(config, source)
    except ConfigError as error:
        raise InvalidFormatError(f"read {source}: {error.message}") from None


def _build(config: Mapping[str, Any], source: str) -> DecoderConfig:
    hidden_size, num_heads = _need_size(config, "hidden_size"), _need_size(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(f"hidden_size: got {hidden_size}, expected a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    num_kv_heads = config.get("num_key_value_heads")
    return DecoderConfig(
        vocab_size=_need_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_need_size(config, "intermediate_size"),
        num_layers=_need_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_need_size(config, "max_position_embeddings"),
        rms_norm_eps=_need(config, "rms_norm_eps"),
        rope_theta=_rope_theta(config, source),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
        eos_token_ids=token_ids(config.get("eos_token_id"), "eos_token_id"),
        bos_token_id=one_token_id(config.get("bos_token_id"), "bos_token_id"),
        pad_token_id=one_token_id(config.get("pad_token_id"), "pad_token_id"),
        dtype=_dtype(config),
    )


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """One id, a list of ids or nothing; -1 stands for nothing in older files.  Raises ConfigError."""
    found = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or not -1 <= token < 2**32:
            raise ConfigError(f"{field}: got {quoted(value)}, expected a token id or a list of them")
    return tuple(dict.fromkeys(token for token in found if token >= 0))


def one_token_id(value: Any, field: str) -> int | None:
    """A single id or nothing; the first of a list.  Raises ConfigError."""
    found = token_ids(value, field)
    return found[0] if found else None


def _refuse_foreign(config: Mapping[str, Any], source: str) -> None:
    """Everything that makes this another model than the decoder computes.  [D-81]"""
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise InvalidFormatError(f"read {source}: architectures: got {quoted(names)}, expected a list of names")
    kind = config.get("model_type") or ("llama" if "LlamaForCausalLM" in names else None)
    if kind != "llama":
        found = quoted(kind) if kind else f"architectures {quoted(names)}"
        raise UnsupportedError(f"read {source}: model_type: got {found}, expected 'llama'")
    if names and "LlamaForCausalLM" not in names:
        raise UnsupportedError(f"read {source}: architectures: got {quoted(names)}, expected ['LlamaForCausalLM']")
    for field, neutral in _NEUTRAL.items():
        if config.get(field) not in neutral:
            expected = " or ".join("absent" if value is None else repr(value) for value in neutral)
            raise UnsupportedError(f"read {source}: {field}: got {quoted(config[field])}, expected {expected}")
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"read {source}: hidden_act: got {quoted(activation)}, expected 'silu'")
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UnsupportedError(f"read {source}: layer_types: got {quoted(layers)}, expected all 'full_attention'")


def _rope_theta(config: Mapping[str, Any], source: str) -> Any:
    """theta from `rope_parameters` (transformers 5) or the top level (4); any scaling is refused by its name."""
    bases: dict[str, Any] = {}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{field}: got {quoted(rope)}, expected an object or null")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in _PLAIN_ROPE or any(isinstance(value, Mapping) for value in rope.values()):
            found = kind if kind not in _PLAIN_ROPE else "one set per layer type"
            raise UnsupportedError(f"read {source}: {field}: got {quoted(found)}, expected 'default' or absent")
        if rope.get("partial_rotary_factor") not in (None, 1):
            found = rope["partial_rotary_factor"]
            raise UnsupportedError(f"read {source}: {field}.partial_rotary_factor: got {quoted(found)}, expected 1")
        if rope.get("rope_theta") is not None:
            bases[f"{field}.rope_theta"] = rope["rope_theta"]
    found_bases = list(bases.values())
    if any(base != found_bases[0] for base in found_bases[1:]):
        raise ConfigError(f"rope_theta: got {quoted(bases)}, expected one value")
    return found_bases[0] if found_bases else DEFAULT_ROPE_THETA


def _need(config: Mapping[str, Any], field: str) -> Any:
    if config.get(field) is None:
        raise ConfigError(f"{field}: got nothing, expected a value")
    return config[field]


def _need_size(config: Mapping[str, Any], field: str) -> int:
    value = _need(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{field}: got {quoted(value)}, expected a positive integer")
    return value


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{field}: got {quoted(value)}, expected true or false")
    return value


def _dtype(config: Mapping[str, Any]) -> str | None:
    value = config.get("dtype", config.get("torch_dtype"))
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"dtype: got {quoted(value)}, expected a name such as 'bfloat16'")
    return value
