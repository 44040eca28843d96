"""Llama and its near relatives: RMSNorm, rotary positions, grouped queries, gated feed-forward.

Clause: MD-CONFIG-4.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.models.config import FULL, SLIDING
from ferrum_ref.models.config_hf import HfFields, sizes
from ferrum_ref.models.family import Family
from ferrum_ref.models.rope_reading import rope_fields


def read_llama(fields: HfFields) -> dict[str, Any]:
    """Llama 1-3 and TinyLlama: biases of either kind if their flags say so."""
    common = sizes(fields)
    return {
        **common,
        **rope_fields(fields, common["head_dim"]),
        "hidden_act": fields.activation(),
        "attention_bias": fields.flag("attention_bias"),
        "mlp_bias": fields.flag("mlp_bias"),
    }


def read_mistral(fields: HfFields) -> dict[str, Any]:
    """Every layer slides, unless the window is null."""
    return {**read_plain(fields), **all_sliding(fields)}


def read_qwen2(fields: HfFields) -> dict[str, Any]:
    """q, k and v have biases, always; layers from max_window_layers on slide if use_sliding_window."""
    return {
        **read_plain(fields),
        **late_sliding(fields),
        "attention_bias": True,
        "attention_output_bias": False,
    }


def read_qwen3(fields: HfFields) -> dict[str, Any]:
    """Queries and keys are normed by head."""
    return {
        **read_plain(fields),
        **late_sliding(fields),
        "attention_bias": fields.flag("attention_bias"),
        "qk_norm": True,
    }


def read_phi3(fields: HfFields) -> dict[str, Any]:
    """Fused q/k/v and gate/up matrices, partly turned heads, long factors; every layer slides if there is a window."""
    common = sizes(fields)
    named = fields.get("rope_scaling") or fields.get("rope_parameters")
    if isinstance(named, dict) and named.get("rope_type", named.get("type")) in ("su", "yarn"):  # older names
        renamed = {**named, "rope_type": "longrope", "type": "longrope"}
        fields = HfFields(
            {**fields.values, "rope_scaling": renamed, "rope_parameters": None}, fields.defaults, fields.source
        )
    partial = fields.number("partial_rotary_factor", 1.0)
    return {
        **common,
        **rope_fields(fields, common["head_dim"], kinds=("default", "longrope"), partial=partial),
        **all_sliding(fields),
        "hidden_act": fields.activation(),
        "tensor_layout": "phi3",
    }


def read_plain(fields: HfFields) -> dict[str, Any]:
    """Sizes, positions and activation, without biases."""
    common = sizes(fields)
    return {**common, **rope_fields(fields, common["head_dim"]), "hidden_act": fields.activation()}


def all_sliding(fields: HfFields) -> dict[str, Any]:
    """`sliding_window` holds for every layer."""
    if fields.get("sliding_window") is None:
        return {}
    return {"sliding_window": fields.size("sliding_window"), "layer_types": (SLIDING,) * fields.size(_LAYERS)}


def late_sliding(fields: HfFields) -> dict[str, Any]:
    """Qwen's rule: the layers from max_window_layers on slide, if use_sliding_window; `layer_types` goes before."""
    num_layers = fields.size(_LAYERS)
    window = fields.get("sliding_window") if fields.flag("use_sliding_window") else None
    first = fields.get("max_window_layers")
    late = tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(num_layers))
    types = fields.layer_types(late)
    if SLIDING not in types:
        return {}
    return {"sliding_window": 0 if window is None else fields.size("sliding_window"), "layer_types": types}


_LAYERS: Final = "num_hidden_layers"
_WINDOWED: Final = frozenset({"sliding_window", "layer_types"})
_QWEN_DEFAULTS: Final = MappingProxyType({"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32})

LLAMA: Final = Family(architecture="LlamaForCausalLM", read=read_llama)
MISTRAL: Final = Family(
    architecture="MistralForCausalLM",
    read=read_mistral,
    knows=frozenset({"sliding_window"}),
    defaults=MappingProxyType({"sliding_window": 4096, "num_key_value_heads": 8}),
)
QWEN2: Final = Family(architecture="Qwen2ForCausalLM", read=read_qwen2, knows=_WINDOWED, defaults=_QWEN_DEFAULTS)
QWEN3: Final = Family(
    architecture="Qwen3ForCausalLM",
    read=read_qwen3,
    knows=_WINDOWED,
    defaults=MappingProxyType({**_QWEN_DEFAULTS, "head_dim": 128}),
)
PHI3: Final = Family(
    architecture="Phi3ForCausalLM",
    read=read_phi3,
    knows=frozenset({"sliding_window", "partial_rotary_factor"}),
    defaults=MappingProxyType({"original_max_position_embeddings": 4096}),
)
