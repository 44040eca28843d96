"""GGUF files of every dense architecture, written with gguf's name tables, laid out as llama.cpp's converter does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import load_file

from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig

ARCH = gguf.MODEL_ARCH
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [1.25, 3.5],
    "original_max_position_embeddings": 60,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "num_hidden_layers": 6}
GPT2 = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), ...
    ),
    "max_position_embeddings": ...,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 160,
    "n_inner": 40,
}
CASES: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "llama, biased": (ARCH.LLAMA, hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1, tied": (
        ARCH.LLAMA,
        hf.LlamaConfig,
        {"head_dim": 16, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "qwen2, yarn": (
        ARCH.QWEN2,
        hf.Qwen2Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3": (ARCH.QWEN3, hf.Qwen3Config, {"head_dim": 16}),
    "gemma 2": (
        ARCH.GEMMA2,
        hf.Gemma2Config,
        {
            **GEMMA,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "seed": 1,
        },
    ),
    "gemma 3": (
        ARCH.GEMMA3,
        hf.Gemma3TextConfig,
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi 3": (ARCH.PHI3, hf.Phi3Config, {"sliding_window": 9, "original_max_position_embeddings": 160}),
    "gpt 2": (ARCH.GPT2, hf.GPT2Config, {**GPT2, "tie_word_embeddings": True}),
    "gpt-neox": (
        ARCH.GPTNEOX,
        hf.GPTNeoXConfig,
        {"num_key_value_heads": ..., "hidden_act": "gelu_new", "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
}


def llama3_factors(config: Any) -> np.ndarray:
    """What the converter stores: by how much each frequency is divided."""
    rope, half = config.rope_parameters, np.arange(0, config.head_dim, 2) / config.head_dim
    low, high = (rope["original_max_position_embeddings"] / rope[f"{name}_freq_factor"] for name in ("low", "high"))
    factors = []
    for wave in 2 * math.pi * rope["rope_theta"] ** half:
        smooth = (rope["original_max_position_embeddings"] / wave - 1.0) / 3.0
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if wave < high else rope["factor"] if wave > low else between)
    return np.array(factors, np.float32)


def stored(arch: Any, config: Any, name: str, values: np.ndarray) -> np.ndarray:
    """A tensor as the converter of that architecture lays it out."""
    heads = {"q": config.num_attention_heads, "k": getattr(config, "num_key_value_heads", None)}
    if arch is ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
        count = heads["q" if ".q_proj." in name else "k"]
        by_pair = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        return by_pair.swapaxes(1, 2).reshape(values.shape)
    if arch in (ARCH.GEMMA2, ARCH.GEMMA3) and name.endswith("norm.weight"):
        return values + np.float32(1)
    if arch is ARCH.GPT2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if arch is ARCH.GPTNEOX and "query_key_value" in name:
        by_head = values.reshape(heads["q"], 3, values.shape[0] // heads["q"] // 3, *values.shape[1:])
        return by_head.swapaxes(0, 1).reshape(values.shape)
    return values


def write_gguf(path: Path, arch: Any, config: Any, tensors: dict[str, np.ndarray]) -> Path:
    """A file as the converter writes it, without a tokenizer."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    num_layers = config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or config.n_inner
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch in (ARCH.GPT2, ARCH.GPTNEOX):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if head_dim * config.num_attention_heads != config.hidden_size or arch in (ARCH.GEMMA2, ARCH.GEMMA3):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch is ARCH.GPTNEOX:
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "sliding_window", None) and arch is not ARCH.QWEN2 and arch is not ARCH.QWEN3:
        writer.add_sliding_window(config.sliding_window)
    if arch is ARCH.GEMMA2:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        add_scaling(writer, config, rope)
    names = gguf.get_tensor_name_map(arch, num_layers)
    for name, values in tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        writer.add_tensor(found, np.ascontiguousarray(stored(arch, config, name, values)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_scaling(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        for length in ("short", "long"):
            values = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", values)
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@pytest.fixture
def as_gguf(tmp_path: Path) -> Callable[..., Path]:
    def write(arch: Any, tiny: Any, **changed: Any) -> Path:
        tensors = {**load_file(tiny.path / "model.safetensors"), **changed}
        return write_gguf(tmp_path / "model.gguf", arch, tiny.config, tensors)

    return write


@pytest.mark.clause("MD-CONFIG-6", "MD-NAMES-2", "MD-GGUF-8")
@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_gives_the_logits_of_its_directory(
    name: str, tiny_model: Callable[..., Any], logit_error: Callable[..., float], as_gguf: Callable[..., Path]
) -> None:
    arch, kind, settings = CASES[name]
    tiny = tiny_model(kind, **settings)
    assert logit_error(tiny, as_gguf(arch, tiny)) <= tiny.bound


@pytest.mark.clause("MD-CONFIG-6", "LM-ROPE-8")
def test_long_and_short_factors_lie_in_tensors(
    tiny_model: Callable[..., Any], judge: Callable[..., float], as_gguf: Callable[..., Path]
) -> None:
    tiny = tiny_model(hf.Phi3Config, original_max_position_embeddings=60, sliding_window=None, rope_parameters=LONGROPE)
    judge(tiny, as_gguf(ARCH.PHI3, tiny), whole_forwards=True)


@pytest.mark.clause("MD-CONFIG-6")
@pytest.mark.parametrize("name", ["qwen3", "gemma 2", "gemma 3", "phi 3", "gpt 2"])
def test_configurations_agree_with_the_directory(
    name: str, tiny_model: Callable[..., Any], as_gguf: Callable[..., Path]
) -> None:
    """All but what GGUF holds otherwise: layouts, norms with their 1 added, float32 numbers."""
    arch, kind, settings = CASES[name]
    tiny = tiny_model(kind, **settings)
    with open_checkpoint(as_gguf(arch, tiny)) as file, open_checkpoint(tiny.path) as directory:
        ours, theirs = file.config.to_dict(), directory.config.to_dict()
    for field in ("tensor_layout", "norm_offset", "dtype", "eos_token_ids", "bos_token_id", "attention_output_bias"):
        ours.pop(field), theirs.pop(field)
    assert {key: pytest.approx(value) if isinstance(value, float) else value for key, value in theirs.items()} == ours


@pytest.mark.clause("MD-CONFIG-6")
@pytest.mark.parametrize(("num_layers", "per_head"), [(26, 256), (46, 576 // 4)])
def test_the_largest_gemma_2_scales_otherwise(num_layers: int, per_head: int) -> None:
    metadata = {
        "general.architecture": "gemma2",
        "gemma2.block_count": num_layers,
        "gemma2.context_length": 8192,
        "gemma2.embedding_length": 576,
        "gemma2.feed_forward_length": 1536,
        "gemma2.attention.head_count": 4,
        "gemma2.attention.key_length": 256,
        "gemma2.attention.value_length": 256,
        "gemma2.attention.layer_norm_rms_epsilon": 1e-6,
    }
    config = DecoderConfig.from_gguf(metadata, {"token_embd.weight": (11, 576)})
    assert config.query_scale == per_head**-0.5


@pytest.mark.clause("MD-NAMES-2")
@pytest.mark.parametrize("arch", ["LLAMA", "QWEN2", "QWEN3", "GEMMA2", "GEMMA3", "PHI3", "GPT2", "GPTNEOX"])
def test_every_name_of_gguf_is_known_or_refused(
    arch: str, tiny_model: Callable[..., Any], as_gguf: Callable[..., Path]
) -> None:
    """Each tensor that gguf lists for the architecture has a canonical name, but for the experts and tables."""
    from ferrum_ref.models.tensor_names_gguf import canonical_gguf_name

    own, kind, settings = next(case for case in CASES.values() if case[0] is ARCH[arch])
    tiny = tiny_model(kind, **settings)
    with open_checkpoint(as_gguf(own, tiny)) as checkpoint:
        config = checkpoint.config
    foreign = {"rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd", "ffn_gate_inp"}
    foreign |= {"ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"}
    if arch == "PHI3":
        foreign |= {"attn_q", "attn_k", "attn_v"}
    for tensor in gguf.MODEL_TENSORS[ARCH[arch]]:
        name = gguf.TENSOR_NAMES[tensor].format(bid=1)
        found = canonical_gguf_name(f"{name}.weight", config)
        assert (found is None) == (name.removeprefix("blk.1.") in foreign), name
