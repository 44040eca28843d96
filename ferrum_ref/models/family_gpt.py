"""GPT-2 and GPT-NeoX: LayerNorm with bias, a plain feed-forward with GELU, biases everywhere.

Clause: MD-CONFIG-4.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.models.config import DEFAULT_ROPE_THETA
from ferrum_ref.models.config_fields import positive_number
from ferrum_ref.models.config_hf import HfFields, sizes
from ferrum_ref.models.family import Family
from ferrum_ref.models.rope_reading import rope_fields
from ferrum_ref.models.stored_names import renamed_store


def read_gpt2(fields: HfFields) -> dict[str, Any]:
    """Learned positions; matrices lie [in, out]."""
    common = HfFields(_renamed(fields), fields.defaults, fields.source)
    found = sizes(common, "layer_norm_epsilon")
    return {
        **found,
        "intermediate_size": 4 * found["hidden_size"] if common.get("n_inner") is None else common.size("n_inner"),
        "hidden_act": common.activation("activation_function"),
        "attention_bias": True,
        "mlp_bias": True,
        "gated": False,
        "norm": "layer",
        "learned_positions": True,
        "query_scale": None if common.get("scale_attn_weights", True) else 1.0,
        "scale_by_layer": common.flag("scale_attn_by_inverse_layer_idx"),
        "tensor_layout": "gpt2",
    }


def _renamed(fields: HfFields) -> dict[str, Any]:
    """GPT-2's names of the sizes, as the others have them."""
    names = {
        "n_embd": "hidden_size",
        "n_positions": "max_position_embeddings",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
    }
    values = dict(fields.values)
    for theirs, common in names.items():
        if theirs in values:
            values[common] = values[theirs]
    values["head_dim"] = values["num_key_value_heads"] = None
    values["intermediate_size"] = 1
    return values


def read_gpt_neox(fields: HfFields) -> dict[str, Any]:
    """Attention and feed-forward side by side; a part of each head is turned."""
    values = {**fields.values, "num_key_value_heads": None, "head_dim": None}
    common = HfFields(values, fields.defaults, fields.source)
    found = sizes(common, "layer_norm_eps")
    theta = positive_number(common.get("rotary_emb_base", DEFAULT_ROPE_THETA), "rotary_emb_base")
    return {
        **found,
        **rope_fields(common, found["head_dim"], partial=common.number("rotary_pct", 0.25), theta=theta),
        "hidden_act": common.activation(),
        "attention_bias": common.flag("attention_bias"),
        "mlp_bias": True,
        "gated": False,
        "norm": "layer",
        "parallel_residual": common.flag("use_parallel_residual"),
        "tensor_layout": "gpt_neox",
    }


GPT2: Final = Family(
    architecture="GPT2LMHeadModel",
    read=read_gpt2,
    knows=frozenset({"scale_attn_by_inverse_layer_idx", "scale_attn_weights"}),
    defaults=MappingProxyType(
        {"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    ),
    store=renamed_store(
        ("wte.", "transformer.wte."),
        ("wpe.", "transformer.wpe."),
        ("h.", "transformer.h."),
        ("ln_f.", "transformer.ln_f."),
        unused=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    ),
)
GPT_NEOX: Final = Family(
    architecture="GPTNeoXForCausalLM",
    read=read_gpt_neox,
    knows=frozenset({"rotary_pct", "rotary_emb_base", "use_parallel_residual"}),
    defaults=MappingProxyType(
        {"attention_bias": True, "use_parallel_residual": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    ),
    store=renamed_store(
        ("embed_out.", "lm_head."),
        unused=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
)
