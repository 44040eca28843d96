"""Models with experts as GGUF files, written by ggml's own writer as llama.cpp's converter lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import transformers

from ferrum_ref.errors import FerrumError, InvalidFormatError, UnsupportedError
from ferrum_ref.formats.gguf import GgufFile
from ferrum_ref.models.moe_gguf import is_moe_gguf
from ferrum_ref.models.moe_gguf_store import open_moe_gguf

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen3moe": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek2": (
        transformers.DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "gpt-oss": (
        transformers.GptOssConfig,
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 12,
            "intermediate_size": 32,
            "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    ),
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
EXPERT = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def permuted(weight: Any, num_heads: int) -> Any:
    """What llama.cpp's converter does to a Llama's q and k: halves of a head become adjacent pairs."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(tiny: Any, architecture: str, split_expansion: bool) -> dict[str, Any]:
    """The directory's tensors as the converter names, stacks and turns them."""
    config, found, stacks = tiny.config, {}, {}
    for name, values in safetensors.numpy.load_file(tiny.path / "model.safetensors").items():
        if name in OUTER:
            found[OUTER[name]] = values
            continue
        _, _, layer, rest = name.split(".", 3)
        block = f"blk.{layer}."
        if match := re.fullmatch(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", rest):
            stacks.setdefault(f"{block}ffn_{EXPERT[match[2]]}_exps.weight", {})[int(match[1])] = values
        elif rest == "mlp.experts.gate_up_proj":
            for place, part in enumerate(("gate", "up")):
                found[f"{block}ffn_{part}_exps.weight"] = values[:, :, place::2].swapaxes(1, 2)
        elif rest == "mlp.experts.gate_up_proj_bias":
            found |= {f"{block}ffn_{part}_exps.bias": values[:, place::2] for place, part in enumerate(("gate", "up"))}
        elif rest == "mlp.experts.down_proj":
            found[f"{block}ffn_down_exps.weight"] = values.swapaxes(1, 2)
        elif rest == "mlp.experts.down_proj_bias":
            found[f"{block}ffn_down_exps.bias"] = values
        elif rest == "self_attn.sinks":
            found[f"{block}attn_sinks.weight"] = values
        elif rest == "mlp.gate.e_score_correction_bias":
            found[f"{block}exp_probs_b.bias"] = values
        elif rest == "self_attn.kv_b_proj.weight" and split_expansion:
            by_head = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            key, value = np.split(by_head, [config.qk_nope_head_dim], axis=1)
            found |= {f"{block}attn_k_b.weight": key.swapaxes(1, 2), f"{block}attn_v_b.weight": value}
        else:
            part, kind = rest.rsplit(".", 1)
            stored = LAYER[part]
            if architecture == "gpt-oss" and stored == "ffn_norm":
                stored = "post_attention_norm"
            if architecture == "llama" and stored in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if stored == "attn_q" else config.num_key_value_heads
                values = permuted(values, heads)
            found[f"{block}{stored}.{kind}"] = values
    return found | {name: np.stack([each[i] for i in range(len(each))]) for name, each in stacks.items()}


def write(
    tiny: Any,
    architecture: str,
    path: Path,
    *,
    split_expansion: bool = False,
    form: Callable[[str, Any], str] = lambda _name, _values: "F32",
    **changes: Any,
) -> Path:
    """A GGUF file; `form(name, values)` gives element formats, `changes` go over the metadata (None: left out)."""
    config = tiny.config
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if split_expansion else config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_used_count": config.num_experts_per_tok,
        "expert_count": config.num_local_experts,
    }
    if architecture in ("qwen3moe", "gpt-oss"):
        inner = config.moe_intermediate_size if architecture == "qwen3moe" else config.intermediate_size
        values |= {"expert_feed_forward_length": inner, "attention.key_length": config.head_dim}
        values["attention.value_length"] = config.head_dim
    if architecture == "gpt-oss":
        values["attention.sliding_window"] = config.sliding_window
    if config.rope_parameters["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.rope_parameters["factor"]),
            "rope.scaling.original_context_length": config.rope_parameters["original_max_position_embeddings"],
        }
    if architecture == "deepseek2":
        turned, query = config.qk_rope_head_dim, config.qk_head_dim
        if split_expansion:
            values |= {
                "attention.key_length": config.kv_lora_rank + turned,
                "attention.value_length": config.kv_lora_rank,
                "attention.key_length_mla": query,
                "attention.value_length_mla": config.v_head_dim,
            }
        else:
            values |= {"attention.key_length": query, "attention.value_length": config.v_head_dim}
        values |= {
            "rope.dimension_count": turned,
            "attention.q_lora_rank": config.q_lora_rank,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.norm_topk_prob,
            "expert_gating_func": 2,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
            "rope.scaling.yarn_log_multiplier": 0.1 * config.rope_parameters["mscale_all_dim"],
        }
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**values, **changes}.items():
        key = f"{architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    writer.add_eos_token_id(2)
    for name, each in tensors_of(tiny, architecture, split_expansion).items():
        kind = gguf.GGMLQuantizationType[form(name, each)]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(each), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_of(tiny_model: Any) -> Callable[[str], Any]:
    return lambda name: tiny_model(MODELS[name][0], **MODELS[name][1])


@pytest.mark.clause("MD-MOEGGUF-1", "MD-MOEGGUF-2")
@pytest.mark.parametrize("architecture", MODELS)
def test_a_file_keeps_the_bound_as_its_directory_does(
    architecture: str, tiny_of: Any, load_tiny: Any, tmp_path: Path
) -> None:
    tiny = tiny_of(architecture)
    path = write(tiny, architecture, tmp_path / "model.gguf")
    loaded = load_tiny(path)
    assert loaded.config.architecture == tiny.config.model_type
    assert loaded.config.eos_token_ids == (2,)
    assert np.abs(loaded.logits(tiny.text) - tiny.exact).max() <= tiny.bound
    assert loaded.greedy(tiny.ids, 8) == tiny.continuation[:8]


@pytest.mark.clause("MD-MOEGGUF-3")
def test_an_expansion_in_two_parts_gives_the_same_bits(tiny_of: Any, load_tiny: Any, tmp_path: Path) -> None:
    tiny = tiny_of("deepseek2")
    whole, parts = (
        load_tiny(write(tiny, "deepseek2", tmp_path / f"{split}.gguf", split_expansion=split))
        for split in (False, True)
    )
    assert whole.config == parts.config
    assert np.array_equal(whole.logits(tiny.ids), parts.logits(tiny.ids))


@pytest.mark.clause("MD-MOEGGUF-2", "MD-EXPERT-2")
def test_quantised_experts_stay_packed_or_are_decoded_alike(tiny_model: Any, load_tiny: Any, tmp_path: Path) -> None:
    tiny = tiny_model(
        transformers.Qwen3MoeConfig,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=8,
        num_hidden_layers=2,
        norm_topk_prob=True,
    )
    path = write(tiny, "qwen3moe", tmp_path / "q8.gguf", form=lambda name, _: "Q8_0" if "_exps" in name else "F32")
    packed, dense = load_tiny(path, packed=True), load_tiny(path)
    experts = packed.decoder.weights.layers[0].feed_forward_part.experts
    assert type(experts[0].down).__name__ == "PackedWeight"
    assert packed.decoder.weights.num_bytes() < 0.8 * dense.decoder.weights.num_bytes()
    found, expected = packed.logits(tiny.ids), dense.logits(tiny.ids)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    exact = tiny.exact_logits(tiny.ids)
    assert np.abs(found - exact).max() < 0.2 * np.abs(exact).max()


@pytest.mark.clause("MD-EXPERT-4")
def test_mxfp4_stacks_decode_as_ggml_does(tiny_of: Any, tmp_path: Path) -> None:
    tiny = tiny_of("gpt-oss")
    path = write(
        tiny, "gpt-oss", tmp_path / "mx.gguf", form=lambda name, _: "MXFP4" if "exps.weight" in name else "F32"
    )
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_moe_gguf(GgufFile(path)) as checkpoint:
        for part in ("gate", "up", "down"):
            whole = gguf.dequantize(stored[f"blk.1.ffn_{part}_exps.weight"].data, gguf.GGMLQuantizationType.MXFP4)
            for index in (0, 5):
                name = f"model.layers.1.mlp.experts.{index}.{part}_proj.weight"
                assert np.array_equal(checkpoint.read(name), whole[index])
                assert checkpoint.tensors[name].dtype == "BF16"


REFUSED: list[tuple[str, dict[str, Any], type[FerrumError], str]] = [
    ("qwen3moe", {"expert_count": None}, InvalidFormatError, "qwen3moe.expert_count: got nothing"),
    ("qwen3moe", {"expert_gating_func": 2}, InvalidFormatError, "qwen3moe.expert_gating_func: got 2, expected 1"),
    ("qwen3moe", {"expert_used_count": 9}, InvalidFormatError, "num_experts_per_tok: got 9"),
    ("qwen3moe", {"attention.clamp_kqv": 3.0}, UnsupportedError, "qwen3moe.attention.clamp_kqv: got 3.0"),
    ("deepseek2", {"expert_gating_func": None}, InvalidFormatError, "deepseek2.expert_gating_func: got 1, expected 2"),
    ("deepseek2", {"attention.kv_lora_rank": 15}, InvalidFormatError, "got shape [24, 32], expected [23, 32]"),
    ("gpt-oss", {"attention.sliding_window": None}, InvalidFormatError, "attention.sliding_window: got nothing"),
]


@pytest.mark.clause("MD-MOEGGUF-1")
@pytest.mark.parametrize(("architecture", "changes", "kind", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_file_leaves_out_or_means_otherwise_is_named(
    architecture: str, changes: dict[str, Any], kind: type[FerrumError], message: str, tiny_of: Any, tmp_path: Path
) -> None:
    file = GgufFile(write(tiny_of(architecture), architecture, tmp_path / "model.gguf", **changes))
    assert is_moe_gguf(file.metadata)
    with pytest.raises(kind, match=re.escape(message)):
        open_moe_gguf(file)
    file.close()


@pytest.mark.clause("MD-MOEGGUF-1")
def test_a_llama_without_experts_is_a_plain_llama() -> None:
    assert not is_moe_gguf({"general.architecture": "llama"})
    assert not is_moe_gguf({"general.architecture": "llama", "llama.expert_count": 0})
    assert is_moe_gguf({"general.architecture": "llama", "llama.expert_count": 8})
    assert not is_moe_gguf({"general.architecture": "bert"})
