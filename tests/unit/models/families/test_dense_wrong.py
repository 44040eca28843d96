"""A wrong constant in a dense family's configuration is caught: the logits leave their bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA2 = {
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
NEOX = {"num_key_value_heads": ..., "rope_parameters": {"partial_rotary_factor": 0.5}}
PHI3 = {"sliding_window": 9, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
SLIDING, FULL = "sliding_attention", "full_attention"

WRONG: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "window - 1": (hf.MistralConfig, {"sliding_window": 9}, {"sliding_window": 8}),
    "window + 1": (hf.MistralConfig, {"sliding_window": 9}, {"sliding_window": 10}),
    "phi 3, window + 1": (hf.Phi3Config, PHI3, {"sliding_window": 10}),
    "phi 3, partial rotary": (hf.Phi3Config, PHI3, {"rope_parameters": {"partial_rotary_factor": 1.0}}),
    "first sliding layer": (
        hf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"layer_types": [FULL, FULL, SLIDING]},
    ),
    "llama 3.1 as default": (
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "default"}},
    ),
    "llama 3.1 as linear": (
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear"}},
    ),
    "llama 3.1, low factor": (
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": LLAMA3},
        {"rope_parameters": {"low_freq_factor": 1.1}},
    ),
    "yarn as linear": (
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": YARN},
        {"rope_parameters": {"rope_type": "linear"}},
    ),
    "yarn, attention factor": (
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": YARN},
        {"rope_parameters": {"attention_factor": 1.0}},
    ),
    "yarn, original context": (
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": YARN},
        {"rope_parameters": {"original_max_position_embeddings": 16}},
    ),
    "theta": (hf.Qwen3Config, {"head_dim": 16}, {"rope_parameters": {"rope_theta": 10010.0}}),
    "epsilon": (hf.Qwen3Config, {"head_dim": 16}, {"rms_norm_eps": 1e-4}),
    "gemma 2, no attention cap": (hf.Gemma2Config, GEMMA2, {"attn_logit_softcapping": 1e9}),
    "gemma 2, no final cap": (hf.Gemma2Config, GEMMA2, {"final_logit_softcapping": 1e9}),
    "gemma 2, window + 1": (hf.Gemma2Config, GEMMA2, {"sliding_window": 10}),
    "gemma 2, score scale": (hf.Gemma2Config, GEMMA2, {"query_pre_attn_scalar": 25}),
    "gemma 2, other layers slide": (hf.Gemma2Config, GEMMA2, {"layer_types": [FULL, SLIDING] * 2}),
    "gemma 2, erf gelu": (hf.Gemma2Config, GEMMA2, {"hidden_activation": "gelu"}),
    "gemma 3, one base for all": (
        hf.Gemma3TextConfig,
        GEMMA3,
        {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1000000.0}}},
    ),
    "gemma 3, no scaling": (
        hf.Gemma3TextConfig,
        GEMMA3,
        {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1000000.0}}},
    ),
    "gpt-neox, one after the other": (hf.GPTNeoXConfig, NEOX, {"use_parallel_residual": False}),
    "gpt-neox, tanh gelu": (hf.GPTNeoXConfig, NEOX, {"hidden_act": "gelu_new"}),
    "gpt-neox, partial rotary": (hf.GPTNeoXConfig, NEOX, {"rope_parameters": {"partial_rotary_factor": 0.25}}),
}


@pytest.mark.clause("LM-FORWARD-1", "LM-FORWARD-7", "LM-LAYER-1", "LM-LAYER-2", "LM-LAYER-3", "LM-LAYER-4")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_constant_is_caught(
    name: str,
    tiny_model: Callable[..., Any],
    logit_error: Callable[..., float],
    changed: Callable[..., Any],
) -> None:
    kind, settings, wrong = WRONG[name]
    tiny = tiny_model(kind, **settings)
    assert logit_error(tiny, changed(tiny, **wrong)) > 4 * tiny.bound
