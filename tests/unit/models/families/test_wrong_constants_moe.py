"""A wrong constant is caught: with one number of config.json changed, the logits leave the bound."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from ferrum_ref.errors import FerrumError, InvalidFormatError, UnsupportedError

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 40,
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "sliding_window": 12}),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16},
    ),
    "deepseek-v3": (
        transformers.DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "rope_parameters": {**YARN, "mscale": 0.6, "mscale_all_dim": 1.4},
        },
    ),
    "gpt-oss": (
        transformers.GptOssConfig,
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 12,
            "swiglu_limit": 1.1,
            "num_hidden_layers": 4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"num_experts_per_tok": 3}),
    ("mixtral", {"sliding_window": 11}),
    ("mixtral", {"sliding_window": 13}),
    ("mixtral", {"sliding_window": None}),
    ("mixtral", {"rms_norm_eps": 1e-3}),
    ("mixtral", {"rope_parameters": {"rope_theta": 10000.0}}),  # Llama's
    ("qwen3-moe", {"norm_topk_prob": True}),
    ("qwen3-moe", {"num_experts_per_tok": 2}),
    ("qwen3-moe", {"num_experts_per_tok": 4}),
    ("qwen3-moe", {"rope_parameters": {"rope_theta": 10001.0}}),
    ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 80}),
    ("deepseek-v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek-v3", {"topk_group": 3}),
    ("deepseek-v3", {"n_group": 2}),
    ("deepseek-v3", {"num_experts_per_tok": 2}),
    ("deepseek-v3", {"num_experts_per_tok": 4}),
    ("deepseek-v3", {"norm_topk_prob": False}),
    ("deepseek-v3", {"routed_scaling_factor": 2.499}),
    ("deepseek-v3", {"rope_interleave": False}),
    ("deepseek-v3", {"rope_parameters": {"mscale": None}}),
    ("deepseek-v3", {"rope_parameters": {"mscale_all_dim": None}}),
    ("deepseek-v3", {"rope_parameters": {"mscale": 0.601}}),
    ("deepseek-v3", {"rope_parameters": {"factor": 4.01}}),
    ("deepseek-v3", {"rope_parameters": {"beta_fast": 2.0}}),
    ("deepseek-v3", {"rope_parameters": {"original_max_position_embeddings": 80}}),
    ("deepseek-v3", {"rope_parameters": {"rope_type": "linear"}}),
    ("gpt-oss", {"swiglu_limit": None}),  # the default stands in: 7
    ("gpt-oss", {"swiglu_limit": 1.2}),
    ("gpt-oss", {"swiglu_alpha": 1.0}),
    ("gpt-oss", {"num_experts_per_tok": 2}),
    ("gpt-oss", {"num_experts_per_tok": 4}),
    ("gpt-oss", {"sliding_window": 11}),
    ("gpt-oss", {"sliding_window": 13}),
    ("gpt-oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("gpt-oss", {"layer_types": ["full_attention"] * 4}),
    ("gpt-oss", {"rope_parameters": {"truncate": True}}),
    ("gpt-oss", {"rope_parameters": {"rope_type": "default"}}),
]


def without(pattern: str, value: float = 0.0) -> Any:
    """The tensors of that name, all `value`."""
    return lambda name, tensor: torch.full_like(tensor, value) if re.fullmatch(pattern, name) else tensor


IGNORED: dict[str, tuple[str, Any]] = {
    "the correction of the choice": ("deepseek-v3", without(r".*e_score_correction_bias")),
    "the shared experts": ("deepseek-v3", without(r".*shared_experts\.down_proj\.weight")),
    "the sinks": ("gpt-oss", without(r".*\.sinks", -1e9)),
    "the router's bias": ("gpt-oss", without(r".*router\.bias")),
    "the experts' biases": ("gpt-oss", without(r".*experts\.down_proj_bias")),
    "the order of gate and up": (
        "gpt-oss",
        lambda name, tensor: tensor.roll(1, -1).contiguous() if name.endswith("gate_up_proj") else tensor,
    ),
    "one row of one expert": (
        "mixtral",
        lambda name, tensor: tensor.roll(1, 0) if name.endswith("1.block_sparse_moe.experts.3.w2.weight") else tensor,
    ),
}


@pytest.mark.clause(
    "LM-MOE-1", "LM-MOE-3", "LM-MOE-5", "LM-MOE-6", "LM-MOE-7", "LM-MOE-8", "LM-LATENT-1", "LM-LATENT-4", "LM-JUDGE-2"
)
@pytest.mark.parametrize(("name", "fields"), WRONG, ids=lambda value: value if isinstance(value, str) else str(value))
def test_a_wrong_constant_leaves_the_bound(
    name: str, fields: dict[str, Any], tiny_model: Any, changed: Any, logit_error: Any
) -> None:
    kind, settings = MODELS[name]
    tiny = tiny_model(kind, **settings)
    assert logit_error(tiny) <= tiny.bound
    assert logit_error(tiny, changed(tiny, **fields)) > tiny.bound


@pytest.mark.clause("LM-MOE-3", "LM-MOE-7", "LM-MOE-8", "LM-JUDGE-2")
@pytest.mark.parametrize("what", IGNORED)
def test_a_tensor_that_is_ignored_leaves_the_bound(
    what: str, tiny_model: Any, rewritten: Any, logit_error: Any
) -> None:
    name, change = IGNORED[what]
    kind, settings = MODELS[name]
    tiny = tiny_model(kind, **settings)
    assert logit_error(tiny, rewritten(tiny, change)) > tiny.bound


REFUSED: list[tuple[str, dict[str, Any], type[FerrumError], str]] = [
    ("mixtral", {"num_experts_per_tok": 5}, InvalidFormatError, "num_experts_per_tok: got 5, expected at most 4"),
    ("mixtral", {"num_local_experts": 5}, InvalidFormatError, "mlp.gate.weight: got shape [4, 32], expected [5, 32]"),
    ("mixtral", {"hidden_act": "gelu"}, UnsupportedError, "hidden_act: got 'gelu', expected 'silu'"),
    ("qwen3-moe", {"mlp_only_layers": [0]}, InvalidFormatError, "model.layers.0.mlp.gate_proj.weight: got nothing"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, InvalidFormatError, "model.layers.0.mlp.gate_proj.weight: got nothing"),
    ("qwen3-moe", {"mlp_only_layers": "0"}, InvalidFormatError, "mlp_only_layers: got '0', expected a list"),
    ("qwen3-moe", {"moe_intermediate_size": 17}, InvalidFormatError, "got shape [16, 32], expected [17, 32]"),
    ("deepseek-v3", {"n_group": 3}, InvalidFormatError, "n_group: got 3, expected a divisor of the 8 experts"),
    ("deepseek-v3", {"n_group": 8}, InvalidFormatError, "n_group: got 8, expected at least 2"),
    ("deepseek-v3", {"topk_group": 5}, InvalidFormatError, "topk_group: got 5, expected at most n_group 4"),
    ("deepseek-v3", {"num_experts_per_tok": 5}, InvalidFormatError, "num_experts_per_tok: got 5, expected at most 4"),
    ("deepseek-v3", {"kv_lora_rank": 15}, InvalidFormatError, "kv_a_proj_with_mqa.weight: got shape [32, 32]"),
    ("deepseek-v3", {"first_k_dense_replace": 0}, InvalidFormatError, "model.layers.0.mlp.gate.weight: got nothing"),
    ("gpt-oss", {"swiglu_limit": -1.0}, InvalidFormatError, "swiglu_limit: got -1.0"),
    ("gpt-oss", {"attention_bias": False}, InvalidFormatError, "tensors that the configuration has no place for"),
]


@pytest.mark.clause("LM-MOE-9", "LM-MOE-5", "LM-MOE-6", "LM-MOE-7", "LM-LATENT-5")
@pytest.mark.parametrize(("name", "fields", "kind", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_configuration_that_contradicts_itself_or_the_tensors_is_refused(
    name: str,
    fields: dict[str, Any],
    kind: type[FerrumError],
    message: str,
    tiny_model: Any,
    changed: Any,
    load_tiny: Any,
) -> None:
    config, settings = MODELS[name]
    path = changed(tiny_model(config, **settings), **fields)
    with pytest.raises(kind, match=re.escape(message)):
        load_tiny(path)


@pytest.mark.clause("LM-MOE-7")
@pytest.mark.parametrize(
    "field", [("scoring_func", "softmax"), ("topk_method", "greedy"), ("moe_layer_freq", 2)], ids=lambda field: field[0]
)
def test_deepseek_variants_that_route_otherwise_are_refused(field: tuple[str, Any]) -> None:
    from ferrum_ref.errors import ConfigError
    from ferrum_ref.models.moe_config import deepseek_moe

    with pytest.raises(ConfigError, match=f"{field[0]}: got"):
        deepseek_moe(dict([field]))
