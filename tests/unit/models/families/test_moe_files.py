"""The same model in the forms that files have it: each writer's names, old spellings of config.json, MXFP4, 16 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.types.devices import DataType

LATENT = {
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
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 40,
    },
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16},
    ),
    "deepseek_v3": (transformers.DeepseekV3Config, LATENT),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "sliding_window": 12,
            "hidden_size": 64,
            "intermediate_size": 32,
        },
    ),
}
IDS = np.random.default_rng(0).integers(3, 67, 50).tolist()


@pytest.fixture
def tiny_of(tiny_model: Any) -> Callable[[str], Any]:
    return lambda name: tiny_model(MODELS[name][0], **MODELS[name][1])


def copied(tiny: Any, path: Path, tensors: Any = None, config: Any = None) -> Path:
    """The directory with other tensors, or with a config.json that `config` has changed."""
    shutil.copytree(tiny.path, path)
    if tensors is not None:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        found = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config(found)))
    return path


@pytest.mark.clause("MD-EXPERT-2")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_stacked_names_of_a_running_model_give_the_same_bits(
    name: str, tiny_of: Any, load_tiny: Any, tmp_path: Path
) -> None:
    tiny = tiny_of(name)
    tensors = tiny.make().state_dict()
    assert any(each.endswith("experts.gate_up_proj") for each in tensors)
    stacked = copied(tiny, tmp_path / "stacked", tensors=tensors)
    assert np.array_equal(load_tiny(stacked).logits(IDS), load_tiny(tiny.path).logits(IDS))


@pytest.mark.clause("LM-MOE-7")
def test_the_layer_that_drafts_a_further_token_is_left_alone(tiny_of: Any, load_tiny: Any, tmp_path: Path) -> None:
    tiny = tiny_of("deepseek_v3")
    tensors = safetensors.torch.load_file(tiny.path / "model.safetensors")
    more = {
        **tensors,
        "model.layers.3.eh_proj.weight": torch.zeros(4, 4),
        "model.layers.3.mlp.gate.weight": torch.ones(2),
    }
    drafting = copied(tiny, tmp_path / "drafting", tensors=more)
    assert np.array_equal(load_tiny(drafting).logits(IDS), load_tiny(tiny.path).logits(IDS))
    beyond = {**tensors, "model.layers.4.eh_proj.weight": torch.zeros(4, 4)}
    with pytest.raises(InvalidFormatError, match=r"model\.layers\.4\.eh_proj\.weight"):
        load_tiny(copied(tiny, tmp_path / "beyond", tensors=beyond))


def older(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 and the published files spell it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {**rope, "type": kind} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("transformers_version")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
        config |= {"max_window_layers": 48, "sliding_window": None}
    if config["model_type"] == "deepseek_v3":
        for field in ("head_dim", "qk_head_dim", "rope_interleave"):
            config.pop(field)
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
    if config["model_type"] == "gpt_oss":
        config |= {"experts_per_token": 3, "initial_context_length": 4096}
        config.pop("swiglu_alpha")
    return config


@pytest.mark.clause("LM-MOE-5", "LM-MOE-6", "LM-MOE-7", "LM-MOE-8", "LM-LATENT-5")
@pytest.mark.parametrize("name", MODELS)
def test_published_spellings_mean_the_same(name: str, tiny_of: Any, tmp_path: Path) -> None:
    tiny = tiny_of(name)
    with open_checkpoint(tiny.path) as new, open_checkpoint(copied(tiny, tmp_path / "old", config=older)) as old:
        assert old.config == new.config
        assert dict(old.tensors) == dict(new.tensors)


@pytest.mark.clause("LM-MOE-5", "LM-MOE-8")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_a_silent_file_means_is_what_transformers_means(name: str, tiny_of: Any, tmp_path: Path) -> None:
    def silent(config: dict[str, Any]) -> dict[str, Any]:
        for field in ("rope_parameters", "num_experts_per_tok", "swiglu_limit", "swiglu_alpha", "layer_types"):
            config.pop(field, None)
        return config

    tiny = tiny_of(name)
    path = copied(tiny, tmp_path / "silent", config=silent)
    theirs = transformers.AutoConfig.from_pretrained(path)
    with open_checkpoint(path) as checkpoint:
        ours = checkpoint.config
    assert ours.moe is not None
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.moe.experts_per_token == theirs.num_experts_per_tok
    if name == "gpt_oss":
        assert (ours.moe.clip_limit, ours.moe.clip_alpha) == (theirs.swiglu_limit, theirs.swiglu_alpha)
        assert list(ours.layer_types) == theirs.layer_types
        assert ours.rope is not None
        assert (ours.rope.kind, ours.rope.factor, ours.rope.truncate) == ("yarn", 32.0, False)
        assert ours.rope.original_positions == 4096


@pytest.mark.clause("MD-EXPERT-4", "MD-HFQ-1", "LM-MOE-8")
def test_mxfp4_experts_run_as_transformers_dequantises_them(tiny_of: Any, load_tiny: Any, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tiny = tiny_of("gpt_oss")
    tensors = safetensors.torch.load_file(tiny.path / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(1)
    for name in [each for each in tensors if each.endswith(("gate_up_proj", "down_proj"))]:
        count, inner, outer = packed.pop(name).shape
        blocks = torch.randint(0, 256, (count, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (count, outer, inner // 32), generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert plain[name].shape == (count, inner, outer)
    paths = [copied(tiny, tmp_path / kind, tensors=each) for kind, each in (("p", packed), ("d", plain))]
    config = json.loads((paths[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (paths[0] / "config.json").write_text(json.dumps(config))  # as the published files say it
    one, other = (load_tiny(path) for path in paths)
    assert np.array_equal(one.logits(IDS), other.logits(IDS))
    assert np.isfinite(one.logits(IDS)).all()


@pytest.mark.clause("LM-MOE-1", "LM-LATENT-2")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [DataType.BF16, DataType.FP16])
def test_sixteen_bits_run_and_are_near(name: str, dtype: DataType, tiny_of: Any, load_tiny: Any) -> None:
    """Experts may change hands when everything is rounded, so only most rows are held to the rounding's size."""
    tiny = tiny_of(name)
    exact = tiny.exact_logits(IDS)
    loaded = load_tiny(tiny.path, dtype=dtype)
    found = loaded.logits(IDS).astype(np.float64)
    unit = 2.0**-8 if dtype is DataType.BF16 else 2.0**-11
    error = np.abs(found - exact).max(axis=1) / np.abs(exact).max()
    assert np.median(error) < 16 * unit
    assert np.isfinite(found).all()
