"""Gemma 2 and the text part of Gemma 3: (1 + w) norms, four of them a layer, a scaled embedding, windows.

Clause: MD-CONFIG-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config import FULL, SLIDING, quoted
from ferrum_ref.models.config_fields import positive_number
from ferrum_ref.models.config_hf import HfFields, sizes
from ferrum_ref.models.family import Family
from ferrum_ref.models.rope_reading import rope_fields, rope_settings
from ferrum_ref.models.stored_names import renamed_store

GLOBAL_THETA: Final = 1_000_000.0
LOCAL_THETA: Final = 10_000.0


def read_gemma2(fields: HfFields) -> dict[str, Any]:
    """Every other layer slides, the first one too; scores and logits are capped."""
    common = _gemma(fields, 2)
    return {
        **common,
        **rope_fields(fields, common["head_dim"]),
        "attention_softcap": fields.number("attn_logit_softcapping"),
    }


def read_gemma3(fields: HfFields) -> dict[str, Any]:
    """Five layers of six slide and turn by a base of their own; queries and keys are normed."""
    pattern = fields.size("sliding_window_pattern") if fields.get("sliding_window_pattern") is not None else 6
    common = _gemma(fields, pattern)
    parameters = fields.get("rope_parameters")
    by_type: Mapping[str, Any] = {} if parameters is None else parameters
    if not isinstance(by_type, Mapping):
        raise ConfigError(f"rope_parameters: got {quoted(by_type)}, expected an object for each layer type")
    scaling = fields.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling: got {quoted(scaling)}, expected an object or null")
    for name, value in by_type.items():
        if name not in (FULL, SLIDING) or not isinstance(value, (Mapping, type(None))):
            fields.refuse(f"rope_parameters.{name}", value, "objects for 'full_attention' and 'sliding_attention'")
    outer = {FULL: fields.get("rope_theta"), SLIDING: fields.get("rope_local_base_freq")}
    ropes = {}
    for kind, theta in ((FULL, GLOBAL_THETA), (SLIDING, LOCAL_THETA)):
        given = {**(by_type.get(kind) or {}), **((scaling or {}) if kind == FULL else {})}
        if given.get("rope_theta") is None:
            given["rope_theta"] = theta if outer[kind] is None else outer[kind]
        ropes[kind] = rope_settings(fields, f"rope_parameters.{kind}", given, common["head_dim"])
    return {
        **common,
        "rope_theta": ropes[FULL].theta,
        "rope": ropes[FULL],
        "local_rope": ropes[SLIDING],
        "qk_norm": True,
    }


def _gemma(fields: HfFields, pattern: int) -> dict[str, Any]:
    """What both have; of `pattern` layers all but the last slide."""
    common = sizes(fields)
    types = fields.layer_types(
        tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(common["num_layers"]))
    )
    slides = SLIDING in types
    return {
        **common,
        "hidden_act": fields.activation("hidden_activation"),
        "attention_bias": fields.flag("attention_bias"),
        "tensor_layout": "gemma",
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": common["hidden_size"] ** 0.5,
        "query_scale": positive_number(fields.get("query_pre_attn_scalar"), "query_pre_attn_scalar") ** -0.5,
        "final_softcap": fields.number("final_logit_softcapping"),
        "sliding_window": fields.size("sliding_window") if slides else 0,
        "layer_types": types if slides else (),
    }


_DEFAULTS: Final = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "num_key_value_heads": 4,
}
_KNOWS: Final = frozenset({"final_logit_softcapping", "layer_types", "query_pre_attn_scalar", "sliding_window"})

GEMMA2: Final = Family(
    architecture="Gemma2ForCausalLM",
    read=read_gemma2,
    knows=_KNOWS | {"attn_logit_softcapping"},
    defaults=MappingProxyType({**_DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
)
GEMMA3: Final = Family(
    architecture="Gemma3ForCausalLM",
    read=read_gemma3,
    knows=_KNOWS | {"rope_local_base_freq"},
    defaults=MappingProxyType(_DEFAULTS),
    store=renamed_store(
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("vision_tower.", None),
        ("multi_modal_projector.", None),
        ("model.vision_tower.", None),
        ("model.multi_modal_projector.", None),
    ),
)
