"""The families with experts: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss.

Clauses: LM-MOE-5..8, LM-LATENT-5 (specs/decoder_families.md).
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ferrum_ref.models.config import FULL, SLIDING
from ferrum_ref.models.config_hf import HfFields, sizes
from ferrum_ref.models.experts_store import ExpertStore
from ferrum_ref.models.family import Family
from ferrum_ref.models.family_llama import all_sliding
from ferrum_ref.models.latent_config import deepseek_latent
from ferrum_ref.models.latent_part import latent_part
from ferrum_ref.models.moe_config import deepseek_moe, gpt_oss_moe, mixtral_moe, qwen3_moe
from ferrum_ref.models.moe_part import sparse_part
from ferrum_ref.models.rope_config import RopeSettings
from ferrum_ref.models.rope_reading import rope_fields

if TYPE_CHECKING:
    from ferrum_ref.models.checkpoint import TensorStore
    from ferrum_ref.models.config import DecoderConfig

_MIXTRAL_THETA: Final = 1e6
_GPT_OSS_THETA: Final = 150000.0
_GPT_OSS_ROPE: Final = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)
_LATENT_ROPES: Final = ("default", "linear", "yarn", "llama3")  # those whose tables no sequence's length changes


def read_mixtral(fields: HfFields) -> dict[str, Any]:
    """Mistral's attention, experts in every layer.  [LM-MOE-5]"""
    common = _sizes(fields)
    return {
        **common,
        **rope_fields(fields, common["head_dim"], theta=_MIXTRAL_THETA),
        **all_sliding(fields),
        "moe": mixtral_moe(fields.values),
    }


def read_qwen3_moe(fields: HfFields) -> dict[str, Any]:
    """Qwen3's attention; every layer slides if use_sliding_window says so.  [LM-MOE-6]"""
    common = _sizes(fields)
    return {
        **common,
        **rope_fields(fields, common["head_dim"]),
        **(all_sliding(fields) if fields.flag("use_sliding_window") else {}),
        "attention_bias": fields.flag("attention_bias"),
        "qk_norm": True,
        "moe": qwen3_moe(fields.values),
    }


def read_deepseek_v3(fields: HfFields) -> dict[str, Any]:
    """Latent attention: to caches and kernels one key/value head of the latent's size.  [LM-MOE-7, LM-LATENT-5]"""
    latent = deepseek_latent(fields.values)
    inner = HfFields({**fields.values, "head_dim": latent.rope_dim}, fields.defaults, fields.source)
    common = _sizes(inner)
    rope = rope_fields(inner, latent.rope_dim, kinds=_LATENT_ROPES)
    rope.setdefault("rope", RopeSettings(rotary_dim=latent.rope_dim, theta=rope["rope_theta"]))
    return {
        **common,
        **rope,
        "num_kv_heads": 1,
        "head_dim": latent.cached_dim,
        "attention_bias": latent.bias,
        "latent": latent,
        "moe": deepseek_moe(fields.values),
    }


def read_gpt_oss(fields: HfFields) -> dict[str, Any]:
    """Sinks, biases, windows in every other layer unless layer_types says otherwise.  [LM-MOE-8]"""
    if not fields.get("rope_parameters") and not fields.get("rope_scaling"):
        fields = HfFields({**fields.values, "rope_parameters": dict(_GPT_OSS_ROPE)}, fields.defaults, fields.source)
    common = _sizes(fields)
    in_turn = tuple(FULL if layer % 2 else SLIDING for layer in range(common["num_layers"]))
    types = fields.layer_types(in_turn)
    return {
        **common,
        **rope_fields(fields, common["head_dim"], theta=_GPT_OSS_THETA),
        "layer_types": types,
        "sliding_window": fields.size("sliding_window") if SLIDING in types else 0,
        "attention_bias": fields.flag("attention_bias"),
        "attention_sinks": True,
        "moe": gpt_oss_moe(fields.values),
    }


def _sizes(fields: HfFields) -> dict[str, Any]:
    """Sizes of a family whose experts know one activation.  Raises ConfigError, UnsupportedError."""
    if fields.activation() != "silu":
        fields.refuse("hidden_act", fields.get("hidden_act"), "'silu'")
    return sizes(fields)


def _split(store: TensorStore, _config: DecoderConfig) -> TensorStore:
    return ExpertStore(store)


def _split_turned(store: TensorStore, _config: DecoderConfig) -> TensorStore:
    return ExpertStore(store, transposed=True)


def _without_next_layer(store: TensorStore, config: DecoderConfig) -> TensorStore:
    """The layer after the last one drafts a further token; the decoder has no use for it."""
    return ExpertStore(store, skipped=re.compile(rf"model\.layers\.{config.num_layers}\..*"))


MIXTRAL: Final = Family(
    architecture="MixtralForCausalLM",
    read=read_mixtral,
    knows=frozenset({"num_local_experts", "sliding_window"}),
    feed_forward=sparse_part,
    store=_split,
)
QWEN3_MOE: Final = Family(
    architecture="Qwen3MoeForCausalLM",
    read=read_qwen3_moe,
    knows=frozenset({"num_experts", "num_local_experts", "sliding_window"}),
    defaults=MappingProxyType({"sliding_window": 4096}),
    feed_forward=sparse_part,
    store=_split,
)
DEEPSEEK_V3: Final = Family(
    architecture="DeepseekV3ForCausalLM",
    read=read_deepseek_v3,
    knows=frozenset({"kv_lora_rank", "n_routed_experts", "num_local_experts", "rope_interleave"}),
    attention=latent_part,
    feed_forward=sparse_part,
    store=_without_next_layer,
)
GPT_OSS: Final = Family(
    architecture="GptOssForCausalLM",
    read=read_gpt_oss,
    knows=frozenset({"layer_types", "num_local_experts", "sliding_window", "swiglu_limit"}),
    defaults=MappingProxyType({"attention_bias": True, "head_dim": 64, "sliding_window": 128}),
    feed_forward=sparse_part,
    store=_split_turned,
)
