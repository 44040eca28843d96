"""What reading does to the weights of a dense family, and what the embedding gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import load_file

from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder_weights import DecoderWeights, read_decoder_weights
from ferrum_ref.models.matrix import PackedWeight
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

NO_LLAMA_SIZES = dict.fromkeys(
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"], ...
)
GPT2 = {**NO_LLAMA_SIZES, "max_position_embeddings": ..., "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160}
NEOX = {"num_key_value_heads": ..., "rope_parameters": {"partial_rotary_factor": 0.5}}


def read(tiny: Any, **options: Any) -> tuple[DecoderWeights, dict[str, np.ndarray]]:
    with open_checkpoint(tiny.path) as checkpoint:
        return read_decoder_weights(checkpoint, load_backend("numpy"), **options), load_file(
            tiny.path / "model.safetensors"
        )


@pytest.mark.clause("LM-WEIGHTS-5")
@pytest.mark.parametrize("packed", [False, True])
def test_matrices_are_turned_and_sorted(packed: bool, tiny_model: Callable[..., Any]) -> None:
    weights, stored = read(tiny_model(hf.GPT2Config, **GPT2), packed=packed)
    layer = weights.layers[1]
    np.testing.assert_array_equal(layer.dense("qkv").to_numpy(), stored["transformer.h.1.attn.c_attn.weight"].T)
    np.testing.assert_array_equal(layer.dense("down").to_numpy(), stored["transformer.h.1.mlp.c_proj.weight"].T)
    weights, stored = read(tiny_model(hf.GPTNeoXConfig, **NEOX), packed=packed)
    rows = stored["gpt_neox.layers.1.attention.query_key_value.weight"]
    head, kind, entry = 3, 1, 2  # the third entry of the fourth head's key
    found = weights.layers[1].dense("qkv").to_numpy()[kind * 32 + head * 8 + entry]
    np.testing.assert_array_equal(found, rows[head * 24 + kind * 8 + entry])
    bias = weights.layers[1].qkv_bias
    assert bias is not None
    stored_bias = stored["gpt_neox.layers.1.attention.query_key_value.bias"]
    assert bias.to_numpy()[kind * 32 + head * 8 + entry] == stored_bias[head * 24 + kind * 8 + entry]


@pytest.mark.clause("LM-WEIGHTS-5")
def test_every_other_matrix_may_stay_packed(
    tiny_model: Callable[..., Any], load_tiny: Callable[..., Any], logit_error: Callable[..., float]
) -> None:
    tiny = tiny_model(hf.Phi3Config, sliding_window=9)
    weights, _ = read(tiny, packed=True)
    dense, _ = read(tiny)
    kinds = load_backend("numpy").capabilities().extra_capabilities.get("quantized_linear", [])
    is_packed = isinstance(weights.layers[0].qkv, PackedWeight)
    assert is_packed == ("F32" in kinds)
    assert weights.num_bytes() == dense.num_bytes()
    found = load_tiny(tiny.path, packed=True).logits(tiny.text)
    assert np.abs(found - tiny.exact).max() <= tiny.bound


@pytest.mark.clause("LM-WEIGHTS-4")
def test_a_norms_offset_is_added_in_float32_and_rounded_once(tiny_model: Callable[..., Any]) -> None:
    tiny = tiny_model(hf.Gemma2Config, head_dim=16)
    for dtype, element in ((DataType.FP32, np.float32), (DataType.BF16, ml_dtypes.bfloat16)):
        weights, stored = read(tiny, dtype=dtype)
        expected = (np.float32(1) + stored["model.layers.0.post_feedforward_layernorm.weight"]).astype(element)
        post = weights.layers[0].ffn_post_norm
        assert post is not None
        np.testing.assert_array_equal(post.to_numpy().astype(np.float32), expected.astype(np.float32))


@pytest.mark.clause("LM-FORWARD-6", "LM-FORWARD-8")
@pytest.mark.parametrize(("kind", "settings"), [(hf.Gemma2Config, {"head_dim": 16}), (hf.GPT2Config, GPT2)])
def test_rows_in_place_of_the_embedding(
    kind: type, settings: dict[str, Any], tiny_model: Callable[..., Any], load_tiny: Callable[..., Any]
) -> None:
    tiny = tiny_model(kind, **settings)
    loaded, ids = load_tiny(tiny.path), [3, 9, 9, 40]
    stored = load_file(tiny.path / "model.safetensors")
    table = stored["transformer.wte.weight" if kind is hf.GPT2Config else "model.embed_tokens.weight"]
    scale = np.float32(32**0.5) if kind is hf.Gemma2Config else np.float32(1)
    rows = loaded.decoder.embed(np.array(ids))
    np.testing.assert_array_equal(rows.to_numpy(), table[ids] * scale)
    batch = ForwardBatch.build([ids], [0]).with_all_logits()
    seen: dict[str, np.ndarray] = {}
    found = loaded.decoder.forward(
        batch,
        loaded.factory.bind([loaded.factory.new_cache()], [4]),
        lambda name, tensor: seen.setdefault(name, tensor.to_numpy()),
        inputs=rows,
    )
    np.testing.assert_array_equal(found.to_numpy(), loaded.logits(ids))
    if kind is hf.GPT2Config:
        np.testing.assert_array_equal(seen["embedding"], table[ids] + stored["transformer.wpe.weight"][:4])
