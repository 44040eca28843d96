"""Rotary tables of every kind against transformers' own functions, and what a configuration may say about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder_rope import inverse_frequencies, scaled_tables
from ferrum_ref.models.rope_config import RopeSettings

SIZES = {
    "vocab_size": 11,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    "yarn, own numbers": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 20,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, given attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS},
    "longrope, given factor": {"rope_type": "longrope", "factor": 2.0, **FACTORS},
}


@pytest.mark.clause("LM-ROPE-3", "LM-ROPE-4", "LM-ROPE-5", "LM-ROPE-6", "LM-ROPE-7", "LM-ROPE-8", "MD-CONFIG-5")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [1, 700, 1025, 9000])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_frequencies_are_transformers(name: str, length: int, spelling: str) -> None:
    theirs = hf.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e5, **KINDS[name]})
    expected, scale = ROPE_INIT_FUNCTIONS[KINDS[name]["rope_type"]](theirs, None, seq_len=torch.tensor(length))
    written: dict[str, Any] = {"model_type": "llama", **SIZES}
    if spelling == "rope_parameters":
        written["rope_parameters"] = {"rope_theta": 5e5, **KINDS[name]}
    else:
        old = {("type" if key == "rope_type" else key): value for key, value in KINDS[name].items()}
        written |= {"rope_theta": 5e5, "rope_scaling": old}
    rope = DecoderConfig.from_hf(written).rope
    assert rope is not None
    np.testing.assert_allclose(inverse_frequencies(rope, length), expected.numpy(), rtol=3e-7)
    cos, sin = scaled_tables(rope, 50, length)
    angles = np.arange(50)[:, None] * expected.numpy().astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles) * scale, rtol=0, atol=2e-5)
    np.testing.assert_allclose(sin, np.sin(angles) * scale, rtol=0, atol=2e-5)


@pytest.mark.clause("LM-ROPE-5")
def test_the_example_of_dynamic_scaling() -> None:
    rope = RopeSettings(rotary_dim=8, theta=1e4, kind="dynamic", factor=3.0, original_positions=48)
    base = 1e4 * 4 ** (4 / 3)
    assert base == pytest.approx(63496, abs=0.5)
    np.testing.assert_allclose(inverse_frequencies(rope, 96), base ** -(np.arange(0, 8, 2) / 8), rtol=1e-6)
    np.testing.assert_array_equal(inverse_frequencies(rope, 48), inverse_frequencies(rope, 1))


@pytest.mark.clause("LM-ROPE-8")
def test_stored_factors() -> None:
    rope = RopeSettings(rotary_dim=4, theta=1e4, kind="stored", factors_in_file=True)
    assert rope.stored_tensors() == {"rope_freqs.weight": (2,)}
    read = rope.with_stored({"rope_freqs.weight": np.array([1.0, 4.0], np.float32)})
    np.testing.assert_allclose(inverse_frequencies(read), [1.0, 0.01 / 4], rtol=1e-6)
    with pytest.raises(ConfigError, match="short_factor: got 0"):
        rope.with_stored({"rope_freqs.weight": np.array([1.0, 0.0], np.float32)})
    with pytest.raises(ConfigError, match="short_factor: got 3 factors, expected 2"):
        rope.with_stored({"rope_freqs.weight": np.ones(3, np.float32)})


@pytest.mark.clause("LM-ROPE-9")
def test_contexts() -> None:
    def context(**rope: Any) -> int:
        return DecoderConfig.from_hf({"model_type": "llama", **SIZES, "rope_scaling": rope}).context_tokens

    assert context(type="dynamic", factor=2.5) == 10240
    assert context(type="yarn", factor=16.0, original_max_position_embeddings=512) == 8192
    assert context(type="yarn", factor=2.0, original_max_position_embeddings=512) == 4096
    assert context(type="linear", factor=2.0) == 4096


@pytest.mark.clause("MD-CONFIG-5", "LM-ROPE-3")
@pytest.mark.parametrize(
    ("rope", "error", "message"),
    [
        ({"type": "linear"}, InvalidFormatError, "rope_scaling.factor: got nothing"),
        ({"type": "linear", "factor": 0}, InvalidFormatError, "factor: got 0, expected a positive"),
        ({"type": "llama3", "factor": 8.0}, InvalidFormatError, "rope_scaling.low_freq_factor: got nothing"),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, InvalidFormatError,
         "high_freq_factor: got 4.0, expected more than low_freq_factor"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, InvalidFormatError,
         "short_factor: got 1 factors, expected 16"),
        ({"type": "longrope", "short_factor": "x", "long_factor": [1.0]}, InvalidFormatError, "short_factor: got 'x'"),
        ({"type": "longrope", **FACTORS, "long_factor": [0.0] * 16}, InvalidFormatError, "long_factor: got 0"),
        ({"type": "yarn", "factor": 2.0, "truncate": 1}, InvalidFormatError, "truncate: got 1"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": -1}, InvalidFormatError,
         "original_max_position_embeddings: got -1"),
        ({"type": "ntk", "factor": 2.0}, UnsupportedError, "rope_scaling: got 'ntk', expected one of default, linear"),
        ({"type": "default", "mrope_section": [1]}, UnsupportedError, "rope_scaling.mrope_section: got"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, UnsupportedError,
         "rope_scaling.partial_rotary_factor: got 0.5, expected 1"),
        ({"full_attention": {"rope_theta": 1.0}}, UnsupportedError, "one set per layer type"),
    ],
)  # fmt: skip
def test_refusals(rope: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DecoderConfig.from_hf({"model_type": "llama", **SIZES, "rope_scaling": rope})


@pytest.mark.clause("MD-CONFIG-5")
def test_two_objects_that_disagree() -> None:
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    with pytest.raises(InvalidFormatError, match="rope_parameters says otherwise"):
        DecoderConfig.from_hf({"model_type": "llama", **SIZES, **both})


@pytest.mark.clause("MD-CONFIG-5")
def test_an_odd_number_of_turned_entries() -> None:
    config = {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.1, "layer_norm_eps": 1e-5}
    with pytest.raises(InvalidFormatError, match=r"partial_rotary_factor: .* turns 3 of 32 entries, expected an even"):
        DecoderConfig.from_hf(config)


@pytest.mark.clause("LM-ROPE-3")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 5}, "rotary_dim: got 5, expected an even number"),
        ({"kind": "ntk"}, "rope_type: got 'ntk'"),
        ({"theta": float("nan")}, "rope_theta: got nan"),
        ({"kind": "yarn"}, "original_max_position_embeddings: got 0"),
        ({"kind": "dynamic", "rotary_dim": 2, "original_positions": 3}, "expected more than 2 for dynamic"),
        ({"kind": "yarn", "original_positions": 3, "theta": 1.0}, "rope_theta: got 1.0"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeSettings(**{"rotary_dim": 8, "theta": 1e4, **changes})
