"""The judge's float64 run of every decoder family: transformers' own, and a wrong constant is named where it acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from ferrum_ref.cli.parity_model import judge_decoder, reference_runs
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.parity.model import FLOOR_FACTOR
from ferrum_ref.parity.model_trace import deviation_of, row_squares, trace_run
from ferrum_ref.plugins import load_backend

Family = tuple[type, dict[str, Any]]
NUM_TOKENS, NUM_GENERATED = 24, 4
UNITS = 2.0**-29  # float64's over float32's
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.0}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16, "num_hidden_layers": 4}
GEMMA_2 = {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0, "tie_word_embeddings": True}
GEMMA_3 = {
    **GEMMA,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GPT_2: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"], ...),
    **dict.fromkeys(["num_key_value_heads", "max_position_embeddings"], ...),
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 160,
    "n_inner": 40,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16}
FAMILIES: dict[str, Family] = {
    "llama": (hf.LlamaConfig, {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2Config, {"hidden_size": 64}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16, "rope_parameters": YARN}),
    "mistral": (hf.MistralConfig, {"head_dim": 16, "sliding_window": 9}),
    "gemma 2": (hf.Gemma2Config, GEMMA_2),
    "gemma 3": (hf.Gemma3TextConfig, GEMMA_3),
    "phi 3": (
        hf.Phi3Config,
        {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt 2": (hf.GPT2Config, {**GPT_2, "tie_word_embeddings": True}),
    "gpt-neox": (
        hf.GPTNeoXConfig,
        {"hidden_size": 64, "num_key_value_heads": ..., "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "mixtral": (hf.MixtralConfig, {"head_dim": 16, "num_local_experts": 4}),
    "qwen3-moe": (hf.Qwen3MoeConfig, {**EXPERTS, "norm_topk_prob": True}),
    "deepseek-v3": (hf.DeepseekV3Config, LATENT),
    "gpt-oss": (
        hf.GptOssConfig,
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 12,
            "swiglu_limit": 1.125,
            "rope_parameters": ROPE,
        },
    ),
}


class RoundedTables(TorchDispatchMode):
    """Rotary tables are inputs: cosines and sines of float32 angles, rounded once, where torch's may be a unit off."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.cos.default, torch.ops.aten.sin.default) and args[0].dtype is torch.float32:
            name = "cos" if func is torch.ops.aten.cos.default else "sin"
            return torch.from_numpy(getattr(np, name)(args[0].numpy().astype(np.float64)).astype(np.float32))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    kind, settings = FAMILIES[request.param]
    return tiny_model(kind, **settings)


def text_of(tiny: Any, count: int = NUM_TOKENS) -> list[int]:
    return [int(token) for token in np.random.default_rng(3).integers(3, tiny.config.vocab_size, count)]


def made_comparable(model: Any) -> Any:
    """Constants that this project keeps as float32 numbers are such numbers in transformers' float64 model too."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.startswith("Gemma") and kind.endswith("RMSNorm"):
            module.weight.data = (1 + module.weight.data.float()).double() - 1
        if kind == "GptOssExperts":
            module.alpha = float(np.float32(module.alpha))
    return model


@pytest.mark.clause("PA-MODEL-1", "PA-WIDE-1", "PA-WIDE-2", "PA-WIDE-3")
@pytest.mark.parametrize("tiny", FAMILIES, indirect=True)
def test_the_float64_run_of_every_family_is_the_one_of_transformers(tiny: Any, stay_double: Callable[[], Any]) -> None:
    """Layer by layer, to float64 noise: the float32 floor scaled by the ratio of the units."""
    text = text_of(tiny)
    with open_checkpoint(tiny.path) as checkpoint:
        runs = reference_runs(checkpoint, len(text))
        exact = trace_run(runs.wide, text, runs.chosen)
        floors = [deviation_of(run, text, exact, runs.chosen) for run in runs.floors]
    model = made_comparable(tiny.double)
    with torch.no_grad(), stay_double(), RoundedTables():
        theirs = model(torch.tensor([text]), use_cache=False, output_hidden_states=True)
    last = len(theirs.hidden_states) - 1
    wanted = {"embedding": theirs.hidden_states[0], "final_norm": theirs.hidden_states[last], "logits": theirs.logits}
    wanted |= {f"layers.{layer}.hidden": theirs.hidden_states[layer + 1] for layer in range(last - 1)}
    for name, tensor in wanted.items():
        assert tensor.dtype is torch.float64
        off = np.sqrt(row_squares(exact.values[name] - tensor[0].numpy()).sum())
        floor = max(np.sqrt(one.squares[name].sum()) for one in floors)
        assert off <= 2 * FLOOR_FACTOR * UNITS * floor or off == floor == 0, (name, off, floor * UNITS)


def decoder_of(path: Any, backend: str = "numpy") -> Decoder:
    chosen = load_backend(backend)
    with open_checkpoint(path) as checkpoint:
        return Decoder(checkpoint.config, read_decoder_weights(checkpoint, chosen), chosen)


@pytest.mark.clause("PA-MODEL-1", "PA-MODEL-3", "PA-MODEL-4", "PA-MODEL-5", "PA-MODEL-6")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("tiny", FAMILIES, indirect=True)
def test_honest_backends_stay_on_the_floor_whatever_the_family(tiny: Any, backend: str) -> None:
    with open_checkpoint(tiny.path) as checkpoint:
        verdict = judge_decoder(decoder_of(tiny.path, backend), checkpoint, text_of(tiny), NUM_GENERATED)
    assert verdict.passed, verdict.faults
    assert verdict.num_compared_rows == verdict.num_rows == NUM_TOKENS + NUM_GENERATED - 1
    assert all(point.error > 0 for point in verdict.layers)


WRONG_IN_ONE_LAYER: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "window + 1": ("mistral", 1, {"sliding_window": 10}, "attention"),
    "window - 1": ("gemma 2", 2, {"sliding_window": 8}, "attention"),
    "score cap": ("gemma 2", 1, {"attn_logit_softcapping": 5.1}, "attention"),
    "score scale": ("gemma 3", 3, {"query_pre_attn_scalar": 16.2}, "attention"),
    "base of the local layers": (
        "gemma 3",
        1,
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10001.0}}},
        "attention",
    ),
    "rotary base": ("qwen2", 2, {"rope_parameters": {"rope_theta": 10001.0}}, "attention"),
    "epsilon": ("qwen3", 1, {"rms_norm_eps": 1e-4}, "attention_norm"),
    "epsilon of a layer norm": ("gpt-neox", 2, {"layer_norm_eps": 1e-3}, "attention_norm"),
    "partial rotary": ("phi 3", 1, {"rope_parameters": {"partial_rotary_factor": 1.0}}, "attention"),
    "gelu": ("gpt 2", 2, {"activation_function": "gelu"}, "gated"),
    "gelu of gpt-neox": ("gpt-neox", 1, {"hidden_act": "gelu_new"}, "gated"),
    "experts a token": ("mixtral", 2, {"num_experts_per_tok": 1}, "routed"),
    "weights not normalised": ("qwen3-moe", 1, {"norm_topk_prob": False}, "routed"),
    "scaling of the experts": ("deepseek-v3", 1, {"routed_scaling_factor": 2.499}, "routed"),
    "pairs not interleaved": ("deepseek-v3", 2, {"rope_interleave": False}, "latent"),
    "limit of the clip": ("gpt-oss", 1, {"swiglu_limit": 1.25}, "routed"),
}


@pytest.mark.clause("PA-MODEL-3", "PA-MODEL-6")
@pytest.mark.parametrize("name", WRONG_IN_ONE_LAYER)
def test_a_wrong_constant_in_one_layer_is_named_where_it_acts(
    name: str, tiny_model: Callable[..., Any], changed: Callable[..., Any]
) -> None:
    family, layer, wrong, point = WRONG_IN_ONE_LAYER[name]
    kind, settings = FAMILIES[family]
    tiny = tiny_model(kind, **settings)
    decoder = decoder_of(tiny.path)
    decoder._layers[layer] = decoder_of(changed(tiny, **wrong))._layers[layer]
    with open_checkpoint(tiny.path) as checkpoint:
        verdict = judge_decoder(decoder, checkpoint, text_of(tiny), NUM_GENERATED)
    assert verdict.first_outside == f"layers.{layer}.{point}"
    assert not verdict.passed
