"""config.json of the dense families: transformers' defaults, both spellings, and what is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers as hf

from ferrum_ref.errors import ConfigError, FerrumError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 256,
    "intermediate_size": 80,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
NEEDED = {"rms_norm_eps", "vocab_size", "architectures", "model_type"}
IDS = {"eos_token_id", "bos_token_id", "pad_token_id", "dtype"}  # of these an absent one means none
KINDS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**SIZES),
    "mistral": hf.MistralConfig(**SIZES),
    "qwen2": hf.Qwen2Config(**SIZES, use_sliding_window=True),
    "qwen3": hf.Qwen3Config(**SIZES, use_sliding_window=True),
    "phi3": hf.Phi3Config(**SIZES),
    "gemma2": hf.Gemma2Config(**SIZES),
    "gemma3_text": hf.Gemma3TextConfig(**SIZES),
    "gpt2": hf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": hf.GPTNeoXConfig(**SIZES),
}


def written(name: str) -> dict[str, Any]:
    return {key: value for key, value in KINDS[name].to_dict().items() if key not in IDS}


@pytest.mark.clause("MD-CONFIG-4")
@pytest.mark.parametrize("name", KINDS)
def test_an_absent_field_means_what_transformers_takes_it_for(name: str) -> None:
    """Each field that is left at its class's default may be left out."""
    whole = written(name)
    expected = DecoderConfig.from_hf(whole)
    plain = type(KINDS[name])().to_dict()
    left_out = [key for key in whole if key not in NEEDED and key not in SIZES and plain.get(key) == whole[key]]
    left_out = [key for key in left_out if not key.startswith("n_") or key == "n_inner"]
    assert len(left_out) > 5
    for field in left_out:
        reduced = {key: value for key, value in whole.items() if key != field}
        if field == "layer_norm_eps":
            continue
        assert DecoderConfig.from_hf(reduced) == expected, field


@pytest.mark.clause("MD-CONFIG-2", "MD-CONFIG-4")
@pytest.mark.parametrize("name", KINDS)
def test_the_older_spelling_means_the_same(name: str) -> None:
    whole = written(name)
    expected = DecoderConfig.from_hf(whole)
    rope = whole.pop("rope_parameters", None)
    if name == "gemma3_text":
        whole |= {"rope_theta": rope["full_attention"]["rope_theta"]}
        whole |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "rope_scaling": None}
    elif name == "gpt_neox":
        whole |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    elif rope is not None:
        whole |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    assert DecoderConfig.from_hf(whole) == expected


@pytest.mark.clause("MD-CONFIG-4")
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_layer_types_follow_from_the_older_fields(name: str) -> None:
    whole = written(name)
    assert len(set(whole["layer_types"])) == 2
    expected = DecoderConfig.from_hf(whole)
    del whole["layer_types"]
    assert DecoderConfig.from_hf(whole) == expected


@pytest.mark.clause("MD-CONFIG-4")
def test_what_each_family_turns_into() -> None:
    configs = {name: DecoderConfig.from_hf(written(name)) for name in KINDS}
    assert {name: config.beyond_llama() for name, config in configs.items()} == {
        "llama": (),
        "mistral": ("sliding_window",),
        "qwen2": ("sliding_window",),
        "qwen3": ("qk_norm", "sliding_window"),
        "phi3": (),
        "gemma2": (
            "hidden_act", "norm_offset", "post_norms", "query_scale", "attention_softcap", "final_softcap",
            "embedding_scale", "sliding_window",
        ),
        "gemma3_text": (
            "hidden_act", "norm_offset", "post_norms", "qk_norm", "query_scale", "embedding_scale", "sliding_window",
            "rope", "local_rope",
        ),
        "gpt2": ("hidden_act", "norm", "gated", "learned_positions"),
        "gpt_neox": ("hidden_act", "norm", "parallel_residual", "gated", "rope"),
    }  # fmt: skip
    windows = {name: [config.window_of(i) for i in range(6)] for name, config in configs.items()}
    assert windows["mistral"] == [4096] * 6
    assert [configs["qwen2"].window_of(i) for i in range(26, 32)] == [0, 0, 4096, 4096, 4096, 4096]
    assert windows["gemma2"] == [4096, 0] * 3
    assert windows["gemma3_text"] == [4096] * 5 + [0]
    assert windows["llama"] == [0] * 6
    assert (configs["qwen3"].head_dim, configs["gemma2"].head_dim, configs["phi3"].head_dim) == (128, 256, 8)
    heads = {name: config.num_kv_heads for name, config in configs.items()}
    assert (heads["mistral"], heads["qwen2"], heads["gemma2"], heads["llama"]) == (8, 32, 4, 32)
    assert configs["gpt_neox"].rope is not None
    assert configs["gpt_neox"].rope.rotary_dim == 2
    assert configs["qwen2"].attention_output_bias is False


@pytest.mark.clause("MD-CONFIG-4")
@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("mistral", {"layer_types": ["sliding_attention"]}, UnsupportedError, "layer_types: got"),
        ("mistral", {"sliding_window": 0}, InvalidFormatError, "sliding_window: got 0"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 32}, UnsupportedError, "got 'chunked_attention'"),
        ("qwen2", {"layer_types": ["full_attention"]}, None, ""),
        ("qwen2", {"layer_types": ["sliding_attention"]}, InvalidFormatError, "layer_types: got 1 of them"),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 32}, InvalidFormatError,
         "sliding_window: got 0"),
        ("qwen3", {"num_experts": 8}, UnsupportedError, "num_experts: got 8"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, UnsupportedError,
         "rope_parameters: got 'linear', expected one of default, longrope"),
        ("gemma2", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention: got True"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, InvalidFormatError, "attention_softcap: got -1.0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, InvalidFormatError, "query_pre_attn_scalar: got 0"),
        ("gemma2", {"hidden_activation": "quick_gelu"}, UnsupportedError, "hidden_activation: got 'quick_gelu'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_softcapping: got 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, UnsupportedError, "rope_parameters.rope_type"),
        ("gpt2", {"add_cross_attention": True}, UnsupportedError, "add_cross_attention: got True"),
        ("gpt2", {"activation_function": "tanh"}, UnsupportedError, "activation_function: got 'tanh'"),
        ("gpt2", {"n_head": 5}, InvalidFormatError, "hidden_size: got 64, expected a multiple"),
        ("gpt_neox", {"hidden_act": "mish"}, UnsupportedError, "hidden_act: got 'mish'"),
        ("llama", {"use_parallel_residual": True}, UnsupportedError, "use_parallel_residual: got True"),
        ("llama", {"model_type": "gpt_bigcode", "architectures": None}, UnsupportedError,
         "model_type: got 'gpt_bigcode', expected one of llama, mistral, qwen2"),
    ],
)  # fmt: skip
def test_refusals_by_name(name: str, changes: dict[str, Any], error: type[FerrumError] | None, message: str) -> None:
    config = {**written(name), **changes}
    if error is None:
        assert DecoderConfig.from_hf(config).layer_types == ()
        return
    with pytest.raises(error, match=message):
        DecoderConfig.from_hf(config)


@pytest.mark.clause("MD-CONFIG-1", "MD-CONFIG-4")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_softcap": float("inf")}, "final_softcap: got inf"),
        ({"sliding_window": -1}, "sliding_window: got -1"),
        ({"layer_types": ("full_attention",)}, "layer_types: got 1 of them, expected one for each of 2 layers"),
        ({"layer_types": ("a", "b")}, "layer_types: got 'a'"),
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window: got 0, expected a number of tokens"),
        ({"embedding_scale": 0.0}, "embedding_scale: got 0"),
        ({"query_scale": -1.0}, "query_scale: got -1"),
    ],
)
def test_the_configuration_itself_refuses(changes: dict[str, Any], message: str) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 2}
    rest = {"num_kv_heads": 1, "head_dim": 4, "max_position_embeddings": 8, "rms_norm_eps": 1e-5}
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**{**sizes, **rest, **changes})


@pytest.mark.clause("MD-CONFIG-4")
def test_interfaces_that_cannot_say_a_family_refuse_it_by_name() -> None:
    from ferrum_ref.models.decoder_weights import DecoderWeights
    from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
    from ferrum_ref.plugins import load_backend

    config = DecoderConfig.from_hf({**written("gpt2"), "n_layer": 1})
    row = load_backend("numpy").tensor_factory().from_numpy(np.zeros((1, 1), np.float32))
    weights = DecoderWeights(row, (None,), row, row)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"'gpt2' with hidden_act, norm, gated, learned_positions"):
        DecoderTransformerWeights(config, weights, load_backend("numpy"))
