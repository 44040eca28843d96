"""Reading weights: what goes where, once each, in the type asked for."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError, NotFoundError
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType


@pytest.mark.clause("LM-WEIGHTS-1", "LM-WEIGHTS-2")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_are_stacked_in_order(tiny_llama: Any, num_threads: int) -> None:
    tiny = tiny_llama(attention_bias=True, mlp_bias=True, num_kv_heads=1)
    weights = read_decoder_weights(tiny, make_backend(), num_threads=num_threads)
    assert len(weights.layers) == 3
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
            stacked = [tiny.tensors[f"{prefix}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            np.testing.assert_array_equal(qkv.to_numpy(), np.concatenate(stacked))
            stacked = [tiny.tensors[f"{prefix}.mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
            np.testing.assert_array_equal(gate_up.to_numpy(), np.concatenate(stacked))
        rest = {
            "self_attn.o_proj.weight": layer.output,
            "self_attn.o_proj.bias": layer.output_bias,
            "mlp.down_proj.weight": layer.down,
            "mlp.down_proj.bias": layer.down_bias,
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.ffn_norm,
        }
        for name, tensor in rest.items():
            np.testing.assert_array_equal(tensor.to_numpy(), tiny.tensors[f"{prefix}.{name}"])
    np.testing.assert_array_equal(weights.final_norm.to_numpy(), tiny.tensors["model.norm.weight"])
    np.testing.assert_array_equal(weights.lm_head.to_numpy(), tiny.tensors["lm_head.weight"])
    assert weights.num_bytes() == sum(values.nbytes for values in tiny.tensors.values())
    assert tiny.num_reads == dict.fromkeys(tiny.tensors, 1)


@pytest.mark.clause("LM-WEIGHTS-1")
def test_a_tied_head_is_the_embedding_itself(tiny_llama: Any) -> None:
    tiny = tiny_llama(tie_word_embeddings=True)
    weights = read_decoder_weights(tiny, make_backend())
    assert weights.lm_head is weights.embedding
    assert weights.num_bytes() == sum(values.nbytes for values in tiny.tensors.values())
    assert weights.layers[0].qkv_bias is weights.layers[0].down_bias is None


@pytest.mark.clause("LM-WEIGHTS-3")
@pytest.mark.parametrize(
    ("dtype", "element"),
    [(DataType.FP32, np.float32), (DataType.FP16, np.float16), (DataType.BF16, ml_dtypes.bfloat16)],
)
def test_weights_come_in_the_type_asked_for(tiny_llama: Any, dtype: DataType, element: Any) -> None:
    tiny = tiny_llama()
    weights = read_decoder_weights(tiny, make_backend(), dtype)
    assert weights.embedding.dtype() is dtype
    down = weights.layers[2].down
    assert down.dtype() is dtype
    np.testing.assert_array_equal(down.to_numpy(), tiny.tensors["model.layers.2.mlp.down_proj.weight"].astype(element))


@pytest.mark.clause("LM-WEIGHTS-3")
def test_bad_arguments_and_missing_tensors(tiny_llama: Any) -> None:
    tiny = tiny_llama()
    with pytest.raises(InvalidParameterError, match="FP32, FP16 or BF16"):
        read_decoder_weights(tiny, make_backend(), DataType.INT8)
    with pytest.raises(InvalidParameterError, match="num_threads"):
        read_decoder_weights(tiny, make_backend(), num_threads=0)

    def read(name: str, dtype: Any = None, out: Any = None) -> Any:
        raise NotFoundError(f"read tensor {name!r}: no such tensor")

    tiny.read = read
    with pytest.raises(NotFoundError, match="no such tensor"):
        read_decoder_weights(tiny, make_backend())


@pytest.mark.clause("LM-WEIGHTS-1")
def test_progress_counts_the_layers(tiny_llama: Any) -> None:
    seen: list[tuple[int, int]] = []
    read_decoder_weights(tiny_llama(), make_backend(), progress=lambda done, total: seen.append((done, total)))
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]
