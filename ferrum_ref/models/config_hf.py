"""config.json of Hugging Face -> DecoderConfig.  Clauses: MD-CONFIG-2, MD-CONFIG-4 (specs/model_files.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import FULL, SLIDING, DecoderConfig, quoted
from ferrum_ref.models.family import Family

# Fields that change the logits in some family: name -> the values that leave a Llama as it is. A family reads those it
# knows; any other of them must be neutral.
FOREIGN: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "add_cross_attention": (None, False),
        "alibi": (None, False),
        "attention_multiplier": (None,),
        "attn_logit_softcapping": (None,),
        "clip_qkv": (None,),
        "embedding_multiplier": (None, 1),
        "final_logit_softcapping": (None,),
        "is_encoder_decoder": (None, False),
        "kv_lora_rank": (None,),
        "logit_scale": (None, 1),
        "logits_scaling": (None, 1),
        "n_routed_experts": (None, 0),
        "no_rope_layers": (None, []),
        "num_experts": (None, 0),
        "num_local_experts": (None, 0),
        "partial_rotary_factor": (None, 1),
        "qk_norm": (None, False),
        "quantization_config": (None,),
        "query_pre_attn_scalar": (None,),
        "residual_multiplier": (None, 1),
        "rope_interleave": (None, False),
        "rope_interleaved": (None, False),
        "rope_local_base_freq": (None,),
        "rotary_emb_base": (None,),
        "rotary_pct": (None, 1),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "scale_attn_weights": (None, True),
        "sliding_window": (None,),
        "swiglu_limit": (None,),
        "use_bidirectional_attention": (None, False),
        "use_parallel_residual": (None, False),
        "use_qk_norm": (None, False),
    }
)
ACTIVATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
    }
)
_TEXT_INSIDE: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {"gemma3": ("gemma3_text", "Gemma3ForConditionalGeneration")}
)


@dataclass(frozen=True, slots=True)
class HfFields:
    """The fields of a config.json; an absent one has the family's default."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    source: str

    def get(self, field: str, default: Any = None) -> Any:
        """The value, null included.  Pure."""
        return self.values[field] if field in self.values else self.defaults.get(field, default)

    def need(self, field: str) -> Any:
        """The value.  Raises ConfigError for none."""
        value = self.get(field)
        if value is None:
            raise ConfigError(f"{field}: got nothing, expected a value")
        return value

    def size(self, field: str) -> int:
        """A count.  Raises ConfigError for none, or something else."""
        value = self.need(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{field}: got {quoted(value)}, expected a positive integer")
        return value

    def flag(self, field: str) -> bool:
        """true or false; false if there is none.  Raises ConfigError for something else."""
        value = self.get(field, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{field}: got {quoted(value)}, expected true or false")
        return value

    def number(self, field: str, default: float = 0.0) -> float:
        """A finite number; `default` for null.  Raises ConfigError for something else."""
        from ferrum_ref.models.config_fields import finite_number

        value = self.get(field)
        return default if value is None else finite_number(value, field)

    def activation(self, field: str = "hidden_act") -> str:
        """The decoder's name of an activation; silu if there is none.  Raises UnsupportedError for another."""
        value = self.get(field, "silu")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.refuse(field, value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, field: str, value: Any, expected: str) -> None:
        """Raises UnsupportedError, naming the field."""
        raise UnsupportedError(f"read {self.source}: {field}: got {quoted(value)}, expected {expected}")

    def head_dim(self) -> int:
        """`head_dim`, else hidden size / heads.  Raises ConfigError if that is no whole number."""
        value = self.get("head_dim")
        if value is not None:
            return self.size("head_dim")
        hidden_size, num_heads = self.size("hidden_size"), self.size("num_attention_heads")
        if hidden_size % num_heads:
            raise ConfigError(f"hidden_size: got {hidden_size}, expected a multiple of num_attention_heads {num_heads}")
        return hidden_size // num_heads

    def layer_types(self, otherwise: tuple[str, ...]) -> tuple[str, ...]:
        """`layer_types` as written, else `otherwise`.  Raises ConfigError for something else than a list."""
        found = self.get("layer_types")
        if found is None:
            return otherwise
        if not isinstance(found, list):
            raise ConfigError(f"layer_types: got {quoted(found)}, expected a list")
        for kind in found:
            if kind not in (FULL, SLIDING):
                self.refuse("layer_types", kind, f"{FULL!r} or {SLIDING!r}")
        return tuple(found)


def read_hf_config(config: Mapping[str, Any], source: str) -> DecoderConfig:
    """See DecoderConfig.from_hf."""
    if not isinstance(config, Mapping):
        raise InvalidFormatError(f"read {source}: got {type(config).__name__}, expected a JSON object")
    model_type, family, values = _family_of(config, source)
    fields = HfFields(values, family.defaults, source)
    _refuse_foreign(fields, family)
    try:
        return DecoderConfig(architecture=model_type, **{**_common(fields), **family.read(fields)})
    except ConfigError as error:
        raise InvalidFormatError(f"read {source}: {error.message}") from None


def _family_of(config: Mapping[str, Any], source: str) -> tuple[str, Family, Mapping[str, Any]]:
    """model_type, its family, and the fields to read; the text part of a model that has others."""
    from ferrum_ref.models.family_table import FAMILIES

    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise InvalidFormatError(f"read {source}: architectures: got {quoted(names)}, expected a list of names")
    kind = config.get("model_type") or next((k for k, each in FAMILIES.items() if each.architecture in names), None)
    if isinstance(kind, str) and kind in _TEXT_INSIDE:
        inner, whole = _TEXT_INSIDE[kind]
        if names and whole not in names:
            raise UnsupportedError(f"read {source}: architectures: got {quoted(names)}, expected [{whole!r}]")
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise InvalidFormatError(f"read {source}: text_config: got {quoted(text)}, expected an object")
        outer = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")
        values = {**{name: config[name] for name in outer if config.get(name) is not None}, **text}
        return inner, FAMILIES[inner], {**values, "model_type": inner}
    if not isinstance(kind, str) or kind not in FAMILIES:
        found = quoted(kind) if kind else f"architectures {quoted(names)}"
        raise UnsupportedError(f"read {source}: model_type: got {found}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if names and family.architecture not in names:
        raise UnsupportedError(f"read {source}: architectures: got {quoted(names)}, expected [{family.architecture!r}]")
    return kind, family, config


def _refuse_foreign(fields: HfFields, family: Family) -> None:
    """Everything that makes this another model than the decoder computes.  [D-81]"""
    for field, neutral in FOREIGN.items():
        value = fields.get(field)
        if field not in family.knows and value not in neutral:
            fields.refuse(field, value, " or ".join("absent" if each is None else repr(each) for each in neutral))
    types = fields.get("layer_types") or []
    if "layer_types" not in family.knows and (not isinstance(types, list) or any(kind != FULL for kind in types)):
        fields.refuse("layer_types", types, f"all {FULL!r}")


def _common(fields: HfFields) -> dict[str, Any]:
    """What every family reads alike, under the names that most use; GPT-2's are its own reader's."""
    return {
        "vocab_size": fields.size("vocab_size"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "eos_token_ids": token_ids(fields.get("eos_token_id"), "eos_token_id"),
        "bos_token_id": one_token_id(fields.get("bos_token_id"), "bos_token_id"),
        "pad_token_id": one_token_id(fields.get("pad_token_id"), "pad_token_id"),
        "dtype": _dtype(fields),
    }


def sizes(fields: HfFields, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The sizes under the names that all but GPT-2 use.  Raises ConfigError."""
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.get("num_key_value_heads")
    return {
        "hidden_size": fields.size("hidden_size"),
        "intermediate_size": fields.size("intermediate_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": fields.head_dim(),
        "max_position_embeddings": fields.size("max_position_embeddings"),
        "rms_norm_eps": fields.need(eps),
    }


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


def _dtype(fields: HfFields) -> str | None:
    value = fields.get("dtype", fields.get("torch_dtype"))
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"dtype: got {quoted(value)}, expected a name such as 'bfloat16'")
    return value
