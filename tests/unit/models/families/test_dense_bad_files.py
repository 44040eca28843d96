"""Damaged checkpoints of every dense family: one clear error, with the tensor's name and both shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import load_file, save_file

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.finite import require_finite
from ferrum_ref.plugins import load_backend

NO_LLAMA_SIZES = dict.fromkeys(
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"], ...
)
GPT2 = {**NO_LLAMA_SIZES, "max_position_embeddings": ..., "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160}
FAMILIES: dict[str, tuple[type, dict[str, Any], str, str]] = {  # a matrix and a vector of each
    "llama": (hf.LlamaConfig, {}, "model.layers.1.mlp.down_proj.weight", "model.norm.weight"),
    "qwen2": (hf.Qwen2Config, {}, "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.bias"),
    "qwen3": (
        hf.Qwen3Config,
        {"head_dim": 16},
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.self_attn.q_norm.weight",
    ),
    "gemma 2": (
        hf.Gemma2Config,
        {"head_dim": 16},
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.post_feedforward_layernorm.weight",
    ),
    "phi 3": (
        hf.Phi3Config,
        {"sliding_window": None},
        "model.layers.1.self_attn.qkv_proj.weight",
        "model.layers.2.input_layernorm.weight",
    ),
    "gpt 2": (hf.GPT2Config, GPT2, "transformer.h.0.attn.c_attn.weight", "transformer.h.2.ln_2.bias"),
    "gpt-neox": (
        hf.GPTNeoXConfig,
        {"num_key_value_heads": ...},
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.final_layer_norm.bias",
    ),
}


@pytest.fixture
def rewritten(tiny_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """rewritten(family, change) -> a copy of its directory whose tensors `change` has edited in place."""

    def rewrite(family: str, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
        kind, settings, *_ = FAMILIES[family]
        path = tmp_path / "hf"
        shutil.copytree(tiny_model(kind, **settings).path, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return rewrite


@pytest.mark.clause("MD-CKPT-3", "MD-NAMES-1")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["matrix", "vector"])
def test_missing_and_misshaped_tensors(family: str, part: str, rewritten: Callable[..., Path], tmp_path: Path) -> None:
    name = FAMILIES[family][2 if part == "matrix" else 3]
    shape: list[int] = []

    def cut(tensors: dict[str, np.ndarray]) -> None:
        shape.extend(tensors[name].shape)
        tensors[name] = tensors[name][:-2].copy()

    path = rewritten(family, cut)
    wrong = [shape[0] - 2, *shape[1:]]
    with pytest.raises(InvalidFormatError) as found:
        open_checkpoint(path)
    assert f"tensor {name}: got shape {wrong}, expected {shape}" in str(found.value)
    shutil.rmtree(path)
    path = rewritten(family, lambda tensors: tensors.pop(name))
    with pytest.raises(InvalidFormatError) as found:
        open_checkpoint(path)
    assert f"tensor {name}: got nothing, expected shape {shape}" in str(found.value)


@pytest.mark.clause("MD-CKPT-3")
@pytest.mark.parametrize("family", FAMILIES)
def test_extra_tensors(family: str, rewritten: Callable[..., Path]) -> None:
    path = rewritten(family, lambda tensors: tensors.update(surplus=np.zeros(3, np.float32)))
    with pytest.raises(
        InvalidFormatError, match=r"got 1 tensors that the configuration has no place for \('surplus'\)"
    ):
        open_checkpoint(path)


@pytest.mark.clause("MD-CKPT-7")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_no_numbers_are_reported(family: str, value: float, rewritten: Callable[..., Path]) -> None:
    name = FAMILIES[family][2]

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 5] = value

    with open_checkpoint(rewritten(family, spoil)) as checkpoint:
        message = rf"tensor {name}: got 1 of \d+ elements that are not finite \(the first is {value} at \[3, 5\] of \["
        with pytest.raises(InvalidFormatError, match=message):
            checkpoint.check_finite()
        backend = load_backend("numpy")
        with pytest.raises(InvalidFormatError, match=message):
            read_decoder_weights(checkpoint, backend)
        assert read_decoder_weights(checkpoint, backend, check_finite=False).num_bytes() > 0


@pytest.mark.clause("MD-CKPT-7")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_finite_numbers_pass_whatever_their_size(dtype: Any) -> None:
    largest = ml_dtypes.finfo(dtype).max
    values = np.full((3, 700_000), largest, dtype=dtype)
    require_finite("x", values)
    values[2, 5] = np.inf
    values[2, 699_999] = np.nan
    with pytest.raises(InvalidFormatError, match=r"tensor x: got 2 of 2100000 .* inf at \[2, 5\] of \[3, 700000\]"):
        require_finite("x", values)
    require_finite("x", np.zeros(0, dtype))


@pytest.mark.clause("MD-CKPT-3")
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_size": 36}, "embed_tokens.weight: got shape [67, 32], expected [67, 36]"),
        ("llama", {"num_key_value_heads": 4}, "k_proj.weight: got shape [16, 32], expected [32, 32]"),
        ("llama", {"attention_bias": True}, "q_proj.bias: got nothing, expected shape [32]"),
        ("llama", {"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight: got nothing"),
        ("llama", {"num_hidden_layers": 2}, "got 9 tensors that the configuration has no place for"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight: got values that differ from model.embed"),
        ("llama", {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}, "q_norm.weight: got"),
        ("qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "got 9 tensors"),
        ("qwen3", {"head_dim": 8}, "q_proj.weight: got shape [64, 32], expected [32, 32]"),
        ("gemma 2", {"intermediate_size": 44}, "gate_proj.weight: got shape [40, 32], expected [44, 32]"),
        ("phi 3", {"num_key_value_heads": 4}, "qkv_proj.weight: got shape [64, 32], expected [96, 32]"),
        ("gpt 2", {"n_inner": 44}, "mlp.c_fc.weight: got shape [32, 128], expected [32, 44]"),
        ("gpt 2", {"n_positions": 150}, "transformer.wpe.weight: got shape [160, 32], expected [150, 32]"),
        ("gpt-neox", {"attention_bias": False}, "got 6 tensors"),
    ],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_tensors(
    family: str, changes: dict[str, Any], message: str, rewritten: Callable[..., Path]
) -> None:
    path = rewritten(family, lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InvalidFormatError) as found:
        open_checkpoint(path)
    assert message in str(found.value)


@pytest.mark.clause("MD-NAMES-3")
def test_older_names_are_taken_for_the_canonical_ones(rewritten: Callable[..., Path]) -> None:
    def old_gpt2(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)

    with open_checkpoint(rewritten("gpt 2", old_gpt2)) as checkpoint:
        assert "transformer.h.2.ln_2.bias" in checkpoint.tensors
        assert "transformer.h.0.attn.bias" not in checkpoint.tensors


@pytest.mark.clause("MD-NAMES-3")
def test_one_tensor_under_two_names(rewritten: Callable[..., Path]) -> None:
    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"].copy()

    with pytest.raises(InvalidFormatError, match=r"ln_f.bias'?: got it beside"):
        open_checkpoint(rewritten("gpt 2", twice))


@pytest.mark.clause("MD-NAMES-3", "MD-CONFIG-4")
def test_the_text_part_of_a_gemma_3(
    tiny_model: Callable[..., Any], judge: Callable[..., float], tmp_path: Path
) -> None:
    tiny = tiny_model(
        hf.Gemma3TextConfig, head_dim=16, sliding_window=9, query_pre_attn_scalar=24, tie_word_embeddings=False
    )
    path = tmp_path / "hf"
    shutil.copytree(tiny.path, path)
    text = json.loads((path / "config.json").read_text())
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (path / "config.json").write_text(json.dumps({**whole, "vision_config": {}}))
    tensors = load_file(path / "model.safetensors")
    renamed = {f"language_model.{name}": values for name, values in tensors.items()}
    renamed["vision_tower.vision_model.post_layernorm.weight"] = np.ones(3, np.float32)
    renamed["multi_modal_projector.mm_input_projection_weight"] = np.ones((3, 3), np.float32)
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    judge(tiny, path)
    (path / "config.json").write_text(json.dumps({**whole, "text_config": None}))
    with pytest.raises(InvalidFormatError, match="text_config: got None"):
        open_checkpoint(path)
    (path / "config.json").write_text(json.dumps({**whole, "architectures": ["Gemma3ForSequenceClassification"]}))
    with pytest.raises(UnsupportedError, match="architectures: got"):
        open_checkpoint(path)
