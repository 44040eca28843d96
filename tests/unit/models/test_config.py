"""Configurations: both spellings of Hugging Face, GGUF's keys, and the refusal of what would change the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from ferrum_ref.errors import ConfigError, FerrumError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DecoderConfig

OLD: dict[str, Any] = {  # SmolLM2-135M-Instruct's config.json, as the hub has it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "transformers.js_config": {"dtype": "q4"},
    "use_cache": True,
    "vocab_size": 49152,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
    "llama.vocab_size": 49152,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.tokens": ("a", "b"),
}
SHAPES = {"token_embd.weight": (49152, 576)}
EXPECTED = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    eos_token_ids=(2,),
    bos_token_id=1,
    pad_token_id=2,
    dtype="bfloat16",
)


@pytest.mark.clause("MD-CONFIG-2")
def test_old_spelling() -> None:
    assert DecoderConfig.from_hf(OLD) == EXPECTED


@pytest.mark.clause("MD-CONFIG-2")
def test_new_spelling_as_transformers_writes_it() -> None:
    theirs = transformers.LlamaConfig(**{key: value for key, value in OLD.items() if key != "transformers_version"})
    written = theirs.to_dict()
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    assert DecoderConfig.from_hf(written) == EXPECTED


@pytest.mark.clause("MD-CONFIG-3")
def test_gguf_metadata() -> None:
    found = DecoderConfig.from_gguf(GGUF, SHAPES)
    assert found.to_dict() == {**EXPECTED.to_dict(), "dtype": None}
    biased = DecoderConfig.from_gguf(
        GGUF, {**SHAPES, "output.weight": (49152, 576), "blk.0.attn_q.bias": (576,), "blk.0.ffn_gate.bias": (1536,)}
    )
    assert (biased.tie_word_embeddings, biased.attention_bias, biased.mlp_bias) == (False, True, True)


@pytest.mark.clause("MD-CONFIG-2")
def test_defaults_are_transformers() -> None:
    """D-80: without rope_theta a Llama turns by 10000, not by upstream's 500000."""
    optional = (
        "rope_theta",
        "rope_scaling",
        "num_key_value_heads",
        "tie_word_embeddings",
        "eos_token_id",
        "torch_dtype",
    )
    silent = {key: value for key, value in OLD.items() if key not in optional}
    theirs = transformers.LlamaConfig(**{key: silent[key] for key in silent if key != "transformers_version"})
    ours = DecoderConfig.from_hf(silent)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0
    assert ours.num_kv_heads == theirs.num_key_value_heads == 9
    assert ours.tie_word_embeddings is theirs.tie_word_embeddings is False
    assert ours.head_dim == theirs.head_dim
    assert (ours.eos_token_ids, ours.dtype) == ((), None)


@pytest.mark.clause("MD-CONFIG-2")
def test_eos_lists_and_explicit_head_dim() -> None:
    found = DecoderConfig.from_hf({**OLD, "eos_token_id": [2, 0, 2], "pad_token_id": -1, "head_dim": 128})
    assert (found.eos_token_ids, found.pad_token_id, found.head_dim) == ((2, 0), None, 128)


@pytest.mark.clause("MD-CONFIG-2")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mamba"),
        ("model_type", {"deep": 1}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "quick_gelu"),
        ("rope_scaling", {"rope_type": "proportional", "factor": 8.0}),
        ("rope_scaling", {"type": "mrope", "mrope_section": [8, 12, 12]}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "mrope_section": [8, 12, 12]}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("rope_parameters", {"rope_theta": 100000, "partial_rotary_factor": 0.5}),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_interleaved", True),
        ("num_local_experts", 8),
        ("quantization_config", {"quant_method": "gptq"}),
        ("final_logit_softcapping", 30.0),
        ("residual_multiplier", 0.22),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"read config.json: {field}.*: got .*, expected"):
        DecoderConfig.from_hf({**OLD, field: value})


BROKEN_VALUES = (None, "12", 1.5, True, 0, -1, 10**30, [], {})


@pytest.mark.clause("MD-CONFIG-1", "MD-CONFIG-2")
@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", BROKEN_VALUES, ids=str)
def test_impossible_sizes_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidFormatError, match=r"^Invalid format: read config.json: \w+: got .*, (expected|but)"):
        DecoderConfig.from_hf({**OLD, field: value})


@pytest.mark.clause("MD-CONFIG-1", "MD-CONFIG-2")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "num_kv_heads: got 4, expected a divisor of the 9 query heads"),
        ({"hidden_size": 577}, "hidden_size: got 577, expected a multiple"),
        ({"head_dim": 63}, "head_dim: got 63, expected an even number"),
        ({"rope_theta": float("nan")}, "rope_theta: got nan"),
        ({"rope_theta": 10**400}, "rope_theta: got 1000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: got inf"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: got 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps: got True"),
        ({"rms_norm_eps": None}, "rms_norm_eps: got nothing"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "rope_theta: got .*expected one value"),
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear', expected an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id: got '</s>'"),
        ({"eos_token_id": [2, True]}, "eos_token_id: got"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes'"),
        ({"torch_dtype": 16}, "dtype: got 16"),
        ({"architectures": 5}, "architectures: got 5"),
        ({"max_position_embeddings": 2**25}, "max_position_embeddings: got 33554432"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidFormatError, match=message):
        DecoderConfig.from_hf({**OLD, **changes})


@pytest.mark.clause("MD-CONFIG-1")
def test_the_configuration_itself_refuses_too() -> None:
    with pytest.raises(ConfigError, match="num_layers: got 0"):
        DecoderConfig(**{**EXPECTED.to_dict(), "num_layers": 0})
    with pytest.raises(InvalidFormatError, match="got list, expected a JSON object"):
        DecoderConfig.from_hf([])  # type: ignore[arg-type]


@pytest.mark.clause("MD-CONFIG-3")
@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("general.architecture", "mamba", UnsupportedError, "general.architecture: got 'mamba'"),
        ("general.architecture", np.arange(3), UnsupportedError, "general.architecture: got None"),
        ("llama.rope.scaling.type", "su", UnsupportedError, "llama.rope.scaling.type: got 'su'"),
        ("llama.expert_count", 8, UnsupportedError, "llama.expert_count: got 8"),
        ("llama.attention.head_count_kv", np.array([3, 3]), UnsupportedError, "head_count_kv.*got an array"),
        ("llama.rope.dimension_count", 32, UnsupportedError, "dimension_count: got 32, expected head_dim 64"),
        ("llama.attention.sliding_window", 4096, UnsupportedError, "sliding_window: got 4096"),
        ("split.count", 3, UnsupportedError, "split.count: got 3 files"),
        ("llama.vocab_size", 7, InvalidFormatError, "vocab_size: got 7, but token_embd.weight has 49152 rows"),
        ("llama.block_count", "thirty", InvalidFormatError, "block_count: got 'thirty'"),
        ("llama.attention.head_count", 0, InvalidFormatError, "head_count: got 0"),
        ("llama.rope.freq_base", float("nan"), InvalidFormatError, "rope_theta: got nan"),
        ("tokenizer.ggml.eos_token_id", -2, InvalidFormatError, "eos_token_id: got -2"),
    ],
)
def test_gguf_refusals(key: str, value: Any, error: type[FerrumError], message: str) -> None:
    with pytest.raises(error, match=message):
        DecoderConfig.from_gguf({**GGUF, key: value}, SHAPES)


@pytest.mark.clause("MD-CONFIG-3")
def test_gguf_tensors_decide() -> None:
    with pytest.raises(UnsupportedError, match=r"tensor rope_factors_long.weight: got scaled rotary positions"):
        DecoderConfig.from_gguf(GGUF, {**SHAPES, "rope_factors_long.weight": (32,)})
    scaled = DecoderConfig.from_gguf(GGUF, {**SHAPES, "rope_freqs.weight": (32,)})
    assert scaled.rope is not None
    assert scaled.rope.stored_tensors() == {"rope_freqs.weight": (32,)}
    with pytest.raises(InvalidFormatError, match=r"token_embd.weight: got None"):
        DecoderConfig.from_gguf(GGUF, {})
    missing = {key: value for key, value in GGUF.items() if key != "llama.block_count"}
    with pytest.raises(InvalidFormatError, match=r"llama.block_count: got nothing"):
        DecoderConfig.from_gguf(missing, SHAPES)


@pytest.mark.clause("MD-CONFIG-3")
def test_gguf_ends_are_collected() -> None:
    ids = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2**32 - 1}
    assert DecoderConfig.from_gguf({**GGUF, **ids}, SHAPES).eos_token_ids == (2, 7)


@pytest.mark.clause("MD-INSPECT-1")
def test_kv_bytes() -> None:
    assert EXPECTED.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4
