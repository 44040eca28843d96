"""TransformerWeights of a decoder and of a checkpoint: which rows lie where, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights
from ferrum_ref.interfaces.weight_parts import DecoderMatrix
from ferrum_ref.kernels.quant import encode
from ferrum_ref.kernels.quant_matrix import RowMatrix
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.matrix import PackedWeight
from ferrum_ref.models.matrix_reader import packed_part
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights, QkNorms
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.parity_mode import ParityMode

NAMED = {
    "input_layernorm": "layer_input_norm_weight",
    "self_attn.o_proj": "layer_o_weight",
    "post_attention_layernorm": "layer_post_norm_weight",
    "mlp.down_proj": "layer_down_weight",
}
BY_LAYER = [name for name in vars(TransformerWeights) if name.startswith("layer_")]


def weights_of(tiny: Any, backend: str = "numpy", dtype: DataType = DataType.FP32, **options: Any) -> Any:
    return DecoderTransformerWeights.of_checkpoint(tiny, load_backend(backend), dtype, **options)


def with_norms(tiny: Any) -> Any:
    rng = np.random.default_rng(5)
    for layer in range(tiny.config.num_layers):
        for part in "qk":
            values = (1 + 0.3 * rng.standard_normal(tiny.config.head_dim)).astype(np.float32)
            tiny.tensors[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = values
    return tiny


@pytest.mark.clause("TW-CONFIG-1")
def test_dimensions(tiny_llama: Any) -> None:
    tiny = tiny_llama(hidden_size=48, head_dim=16, num_kv_heads=1)
    assert weights_of(tiny).config() == TransformerConfig(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        num_kv_heads=1,
        head_dim=16,  # 48 / 4 is 12
        intermediate_size=56,
        vocab_size=97,
        max_seq_len=96,
        rms_norm_eps=1e-5,
        has_qk_norm=False,
    )
    assert weights_of(tiny, max_tokens=10).config().max_seq_len == 10
    assert weights_of(tiny, max_tokens=1000).config().max_seq_len == 96
    with pytest.raises(InvalidParameterError, match="num_layers"):
        dataclasses.replace(weights_of(tiny).config(), num_layers=-1)
    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    assert names == [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_seq_len",
        "rms_norm_eps",
        "has_qk_norm",
    ]


@pytest.mark.clause("TW-WEIGHTS-1", "TW-BIAS-1")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.FP16])
def test_rows_are_the_checkpoints(tiny_llama: Any, backend: str, dtype: DataType) -> None:
    tiny = tiny_llama(attention_bias=True, mlp_bias=True, num_kv_heads=1)
    weights = weights_of(tiny, backend, dtype)
    element = np.float16 if dtype is DataType.FP16 else np.float32

    def same(found: Any, *names: str) -> None:
        assert found.dtype() is dtype
        stacked = np.concatenate([tiny.tensors[name] for name in names]).astype(element)
        np.testing.assert_array_equal(found.to_numpy(), stacked)

    same(weights.embed_weight(), "model.embed_tokens.weight")
    same(weights.final_norm_weight(), "model.norm.weight")
    same(weights.lm_head_weight(), "lm_head.weight")
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for name, method in NAMED.items():
            same(getattr(weights, method)(layer), f"{prefix}{name}.weight")
        for kind, qkv, gate_up in (
            ("weight", weights.layer_qkv_weight(layer), weights.layer_gate_up_weight(layer)),
            ("bias", weights.layer_qkv_bias(layer), weights.layer_gate_up_bias(layer)),
        ):
            same(qkv, *(f"{prefix}self_attn.{part}_proj.{kind}" for part in "qkv"))
            same(gate_up, *(f"{prefix}mlp.{part}_proj.{kind}" for part in ("gate", "up")))
        same(weights.layer_o_bias(layer), f"{prefix}self_attn.o_proj.bias")
        same(weights.layer_down_bias(layer), f"{prefix}mlp.down_proj.bias")


@pytest.mark.clause("TW-BIAS-1")
def test_no_biases_without_biases_and_none_upstream(tiny_llama: Any) -> None:
    plain = weights_of(tiny_llama())
    tiny = tiny_llama(attention_bias=True, mlp_bias=True)
    backend = load_backend("numpy")
    upstream = DecoderTransformerWeights(
        tiny.config, read_decoder_weights(tiny, backend), backend, parity_mode=ParityMode.UPSTREAM
    )
    for name in BY_LAYER:
        if name.endswith("_bias"):
            assert getattr(plain, name)(0) is None
            assert getattr(upstream, name)(2) is None
            assert getattr(TransformerWeights, name)(plain, 0) is None  # the default body
    assert sum(name.endswith("_bias") for name in BY_LAYER) == 4


@pytest.mark.clause("TW-BIAS-1")
def test_the_example_of_a_dropped_bias(tiny_llama: Any) -> None:
    """A zero q weight and a q bias of 1: q is 1, and 0 for who drops the bias."""
    tiny = tiny_llama(attention_bias=True)
    tiny.tensors["model.layers.0.self_attn.q_proj.weight"][:] = 0
    tiny.tensors["model.layers.0.self_attn.q_proj.bias"][:] = 1
    weights, ops = weights_of(tiny), load_backend("numpy").tensor_ops()
    x = weights.embed_weight().view((3, 0), (4, 32))
    product = ops.matmul(x, ops.transpose(weights.layer_qkv_weight(0), 0, 1))
    assert (product.to_numpy()[0, :32] == 0).all()
    assert (ops.add(product, weights.layer_qkv_bias(0)).to_numpy()[0, :32] == 1).all()


@pytest.mark.clause("TW-WEIGHTS-2", "TW-WEIGHTS-3")
def test_a_decoders_own_tensors_are_handed_out(tiny_llama: Any) -> None:
    tiny, backend = tiny_llama(tie_word_embeddings=True), load_backend("numpy")
    decoder = Decoder(tiny.config, read_decoder_weights(tiny, backend), backend, max_tokens=20)
    weights = DecoderTransformerWeights.of_decoder(decoder)
    assert weights.lm_head_weight() is weights.embed_weight() is decoder.weights.embedding
    assert weights.layer_qkv_weight(1) is decoder.weights.layers[1].qkv
    assert weights.layer_gate_up_weight(2) is decoder.weights.layers[2].gate_up
    assert weights.config().max_seq_len == 20


@pytest.mark.clause("TW-WEIGHTS-4")
@pytest.mark.parametrize("name", BY_LAYER)
def test_a_layer_that_is_not_there(tiny_llama: Any, name: str) -> None:
    weights = weights_of(tiny_llama())
    for layer in (-1, 3, 2**40):
        with pytest.raises(InvalidParameterError, match=rf"{name}: layer must be in \[0, 3\), got {layer}"):
            getattr(weights, name)(layer)


@pytest.mark.clause("TW-WEIGHTS-5")
def test_what_does_not_belong_together(tiny_llama: Any) -> None:
    tiny, backend = tiny_llama(), load_backend("numpy")
    read = read_decoder_weights(tiny, backend)
    with pytest.raises(InvalidParameterError, match="got 3 layers and 0 q/k norms, expected 2 layers"):
        DecoderTransformerWeights(dataclasses.replace(tiny.config, num_layers=2), read, backend)
    norm = QkNorms(read.final_norm, read.final_norm)
    with pytest.raises(InvalidParameterError, match="3 layers and 1 q/k norms"):
        DecoderTransformerWeights(tiny.config, read, backend, qk_norms=(norm,))
    scaled = dataclasses.replace(tiny.config, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(UnsupportedError, match="rope_scaling"):
        DecoderTransformerWeights(scaled, read, backend)


@pytest.mark.clause("TW-ROPE-1")
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_the_rotary_tables_are_transformers(tiny_llama: Any, theta: float) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    weights = weights_of(tiny_llama(rope_theta=theta), max_tokens=50)
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=4,
            head_dim=8,
            max_position_embeddings=96,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )
    tables = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(50)[None])
    for found, expected in zip((weights.rope_cos(), weights.rope_sin()), tables, strict=True):
        assert found.shape() == (50, 4)
        # one last bit of float32 pow in the frequency, times the largest angle
        bound = 50 * np.finfo(np.float32).eps
        assert np.abs(found.to_numpy() - expected[0, :, :4].numpy()).max() <= bound


@pytest.mark.clause("TW-ROPE-1")
def test_the_tables_have_the_weights_type(tiny_llama: Any) -> None:
    weights = weights_of(tiny_llama(), dtype=DataType.BF16)
    assert weights.rope_cos().dtype() is weights.rope_sin().dtype() is DataType.BF16


@pytest.mark.clause("TW-NORM-1", "TW-CONFIG-1")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_per_head_norms(tiny_llama: Any, backend: str) -> None:
    tiny = with_norms(tiny_llama())
    weights = weights_of(tiny, backend)
    assert weights.config().has_qk_norm
    for layer in range(3):
        for part, found in (("q", weights.layer_q_norm_weight(layer)), ("k", weights.layer_k_norm_weight(layer))):
            expected = tiny.tensors[f"model.layers.{layer}.self_attn.{part}_norm.weight"]
            np.testing.assert_array_equal(found.to_numpy(), expected)
    plain = weights_of(tiny_llama(), backend)
    assert plain.layer_q_norm_weight(0) is plain.layer_k_norm_weight(0) is None


@pytest.mark.model
@pytest.mark.clause("TW-WEIGHTS-1", "TW-WEIGHTS-2", "TW-CONFIG-1")
def test_the_real_checkpoint(smollm2_path: Path) -> None:
    from ferrum_ref.models.checkpoint import open_checkpoint

    with open_checkpoint(smollm2_path) as checkpoint:
        weights = weights_of(checkpoint, max_tokens=128)
        config = weights.config()
        assert (config.num_layers, config.num_attention_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
        assert weights.lm_head_weight() is weights.embed_weight()
        assert weights.layer_qkv_weight(29).shape() == ((9 + 2 * 3) * 64, 576)
        k_rows = checkpoint.read("model.layers.29.self_attn.k_proj.weight")
        np.testing.assert_array_equal(weights.layer_qkv_weight(29).to_numpy()[576 : 576 + 192], k_rows)


DENSE = {
    DecoderMatrix.EMBED: ("embed_weight", ()),
    DecoderMatrix.QKV: ("layer_qkv_weight", (1,)),
    DecoderMatrix.OUTPUT: ("layer_o_weight", (1,)),
    DecoderMatrix.GATE_UP: ("layer_gate_up_weight", (1,)),
    DecoderMatrix.DOWN: ("layer_down_weight", (1,)),
    DecoderMatrix.LM_HEAD: ("lm_head_weight", ()),
}


@pytest.mark.clause("TW-PARTS-1", "TW-PARTS-3")
def test_a_dense_matrix_is_one_part(tiny_llama: Any) -> None:
    weights = weights_of(tiny_llama(), dtype=DataType.FP16)
    assert set(DENSE) == set(DecoderMatrix)
    for matrix, (name, layer) in DENSE.items():
        tensor = getattr(weights, name)(*layer)
        for parts in (weights.matrix_parts(matrix, 1), TransformerWeights.matrix_parts(weights, matrix, 1)):
            assert len(parts) == 1
            assert parts[0].tensor is tensor
            assert parts[0].scheme is None
            assert parts[0].shape == tensor.shape()
    assert weights.element_type() is TransformerWeights.element_type(weights) is DataType.FP16


@pytest.mark.clause("TW-PARTS-2", "TW-PARTS-3")
def test_packed_matrices_are_handed_out_as_they_lie(tiny_llama: Any) -> None:
    tiny, backend = tiny_llama(), load_backend("numpy")
    read, factory = read_decoder_weights(tiny, backend), backend.tensor_factory()

    def packed(*named: tuple[str, int]) -> PackedWeight:
        stored = [RowMatrix(encode(name, np.ones((rows, 32), np.float32)), name) for name, rows in named]
        parts = tuple(packed_part(each, factory) for each in stored)
        return PackedWeight(parts, DataType.BF16, backend.tensor_ops(), factory)

    table, qkv = packed(("Q8_0", 97)), packed(("Q4_1", 32), ("Q5_0", 16), ("F16", 16))
    layers = tuple(dataclasses.replace(layer, qkv=qkv) for layer in read.layers)
    changed = dataclasses.replace(read, embedding=table, lm_head=table, layers=layers)
    weights = DecoderTransformerWeights(tiny.config, changed, backend)
    parts = weights.matrix_parts(DecoderMatrix.QKV, 2)
    assert [part.shape for part in parts] == [(32, 32), (16, 32), (16, 32)]
    assert [part.scheme.kind for part in parts] == ["q4_1", "q5_0", "f16"]
    assert all(part.tensor is own.tensor for part, own in zip(parts, qkv.parts, strict=True))
    (embedding,), (head,) = (weights.matrix_parts(each) for each in (DecoderMatrix.EMBED, DecoderMatrix.LM_HEAD))
    assert embedding.tensor is head.tensor is table.parts[0].tensor
    assert weights.element_type() is DataType.BF16
    for name, layer in (DENSE[DecoderMatrix.QKV], DENSE[DecoderMatrix.EMBED], DENSE[DecoderMatrix.LM_HEAD]):
        with pytest.raises(UnsupportedError, match=rf"{name}: got a packed matrix .* take matrix_parts"):
            getattr(weights, name)(*layer)
    for layer in (-1, 3):
        with pytest.raises(InvalidParameterError, match=rf"matrix_parts: layer must be in \[0, 3\), got {layer}"):
            weights.matrix_parts(DecoderMatrix.DOWN, layer)
