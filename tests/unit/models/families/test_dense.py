"""Each dense family and each kind of rotary positions against transformers, on random tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf

Case = tuple[type, dict[str, Any]]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [1.25, 3.5],
    "original_max_position_embeddings": 60,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160, "n_inner": 40}
NO_LLAMA_SIZES = dict.fromkeys(
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"], ...
)
NO_LLAMA_SIZES["max_position_embeddings"] = ...

CASES: dict[str, Case] = {
    "llama": (hf.LlamaConfig, {}),
    "llama, tied, biased, wide heads": (
        hf.LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama 3.1": (hf.LlamaConfig, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama, linear": (
        hf.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    ),
    "llama, yarn": (hf.LlamaConfig, {"head_dim": 16, "rope_parameters": YARN}),
    "qwen2": (hf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, late layers slide": (
        hf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "qwen3, biased, yarn": (hf.Qwen3Config, {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
    "mistral": (hf.MistralConfig, {"sliding_window": 9}),
    "mistral, no window": (hf.MistralConfig, {"sliding_window": None}),
    "gemma 2": (
        hf.Gemma2Config,
        {
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "seed": 2,
        },
    ),
    "gemma 3": (
        hf.Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 4,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "phi 3": (hf.Phi3Config, {"sliding_window": None}),
    "phi 3, partly turned, windowed": (
        hf.Phi3Config,
        {"sliding_window": 9, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt 2": (hf.GPT2Config, {**NO_LLAMA_SIZES, **GPT2_SIZES, "tie_word_embeddings": True}),
    "gpt 2, untied, scaled by layer": (
        hf.GPT2Config,
        {**NO_LLAMA_SIZES, **GPT2_SIZES, "n_inner": None, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt-neox": (hf.GPTNeoXConfig, {"num_key_value_heads": ..., "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "gpt-neox, one after the other": (
        hf.GPTNeoXConfig,
        {
            "num_key_value_heads": ...,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"partial_rotary_factor": 1.0},
        },
    ),
}
GROWING: dict[str, Case] = {
    "llama, dynamic": (
        hf.LlamaConfig,
        {"max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "phi 3, longrope": (
        hf.Phi3Config,
        {"original_max_position_embeddings": 60, "sliding_window": None, "rope_parameters": LONGROPE},
    ),
}


@pytest.mark.clause("LM-FORWARD-1", "LM-LAYER-1", "LM-LAYER-2", "LM-LAYER-3", "LM-LAYER-4", "MD-CONFIG-4")
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    name: str, tiny_model: Callable[..., Any], judge: Callable[..., float]
) -> None:
    kind, settings = CASES[name]
    judge(tiny_model(kind, **settings))


@pytest.mark.clause("LM-ROPE-5", "LM-ROPE-8", "LM-ROPE-9")
@pytest.mark.parametrize("name", GROWING)
def test_tables_that_grow_with_the_sequence(
    name: str, tiny_model: Callable[..., Any], judge: Callable[..., float]
) -> None:
    """From prompts within the original context to continuations beyond it, by whole forwards."""
    kind, settings = GROWING[name]
    judge(tiny_model(kind, **settings), whole_forwards=True)
