"""A decoder over packed weights: the logits of the dense one, from GGUF files and quantised directories.

The judge is transformers in float64 on the numbers that the packed weights mean; the allowance is transformers' own
float32 error on them, times four.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kernels import quant_matrix
from ferrum_ref.kernels.quant import FORMATS, encode
from ferrum_ref.kernels.quant_matrix import RowMatrix
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import DecoderWeights, read_decoder_weights
from ferrum_ref.models.matrix import PackedPart, PackedWeight, apply_matrix, matrix_rows
from ferrum_ref.models.matrix_reader import packed_part
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

TOKENS = np.random.default_rng(2).integers(0, 40, 24)
BLOCKS = [name for name, layout in FORMATS.items() if layout.block_elements > 1]
GGUF_FORMATS = ["F32", "F16", "BF16", *BLOCKS]
SCALE_BYTES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q5_K": (0, 2)}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def logits(path: Path, packed: bool, backend: Any = None) -> tuple[np.ndarray, DecoderWeights]:
    backend = backend or make_backend()
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        weights = read_decoder_weights(checkpoint, backend, packed=packed)
    decoder = Decoder(config, weights, backend)
    shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device)
    factory = ContiguousKvFactory(backend, shape, decoder.max_tokens)
    batch = ForwardBatch.build([TOKENS.tolist()], [0]).with_all_logits()
    return decoder.forward(batch, factory.bind([factory.new_cache()], batch.lengths)).to_numpy(), weights


def allowance(model: transformers.PreTrainedModel) -> tuple[np.ndarray, float]:
    """transformers' logits in float64, and its own largest float32 error, times four."""
    ids = torch.from_numpy(TOKENS)[None]
    with torch.inference_mode():
        narrow = model.float()(ids).logits[0].double()
        exact = model.double()(ids).logits[0]
    return exact.numpy(), 4 * float((narrow - exact).abs().max())


def judge(path: Path, model: transformers.PreTrainedModel) -> DecoderWeights:
    exact, allowed = allowance(model)
    dense, _ = logits(path, packed=False)
    found, weights = logits(path, packed=True)
    assert np.abs(dense - exact).max() <= allowed
    assert np.abs(found - exact).max() <= allowed
    return weights


def stored_bytes(name: str, values: np.ndarray) -> np.ndarray:
    """Rows in format `name`: by gguf where it encodes, by this project for Q4_K and Q6_K, else chosen blocks."""
    try:
        return np.ascontiguousarray(gguf.quantize(values, gguf.GGMLQuantizationType[name])).view(np.uint8)
    except NotImplementedError:
        pass
    if name not in SCALE_BYTES:
        return encode(name, values)
    layout = FORMATS[name]
    rng = np.random.default_rng(values.shape[0])
    shape = (values.shape[0], values.shape[1] // layout.block_elements, layout.block_bytes)
    packed = rng.integers(0, 256, shape, dtype=np.uint8)
    for start in SCALE_BYTES[name]:
        packed[..., start : start + 2] = np.frombuffer(np.float16(0.0005).tobytes(), np.uint8)
    return packed.reshape(values.shape[0], -1)


def write_gguf(path: Path, label: str, tied: bool) -> transformers.LlamaForCausalLM:
    """A llama whose matrices are in one format, and the same model with gguf's own dequantised numbers."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=tied, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    kind = gguf.GGMLQuantizationType[label]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            base = name.removesuffix(".weight")
            if base in OUTER:
                stored = OUTER[base]
            else:
                _, _, layer, part = base.split(".", 3)
                stored = f"blk.{layer}.{LAYER[part]}"
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                writer.add_tensor(f"{stored}.weight", parameter.numpy().copy())
                continue
            packed = stored_bytes(label, parameter.numpy())
            values = gguf.dequantize(packed, kind) if label != "F32" else parameter.numpy().copy()
            parameter.copy_(torch.from_numpy(np.asarray(values, np.float32).reshape(parameter.shape)))
            heads = {"attn_q": 8, "attn_k": 4}.get(stored.rpartition(".")[2])
            if heads is not None:  # llama.cpp's order: the halves of a head become neighbours
                half = len(packed) // heads // 2
                packed = packed.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(packed.shape)
            writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(packed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.clause("MD-PACK-1", "MD-PACK-2", "MD-PACK-3", "MD-GGUF-8")
@pytest.mark.parametrize("label", GGUF_FORMATS)
def test_gguf_of_every_type_runs_packed_as_dense(label: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write_gguf(path, label, tied=label == "Q8_0")
    weights = judge(path, model)
    if label != "F32":
        assert isinstance(weights.embedding, PackedWeight)
        assert weights.num_bytes() < sum(parameter.numel() for parameter in model.parameters()) * 2.2


@pytest.mark.clause("MD-GGUF-1", "MD-PACK-2")
def test_version_2_is_read_as_version_3(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "Q4_0", tied=False)
    wanted, _ = logits(path, packed=True)
    content = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", content, 4) == (3,)
    struct.pack_into("<I", content, 4, 2)
    path.write_bytes(content)
    found, _ = logits(path, packed=True)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.clause("MD-PACK-1", "MD-PACK-2", "MD-HFQ-3")
def test_quantised_directories_run_packed_as_dense(quantized: Any) -> None:
    weights = judge(quantized.write(), quantized.model)
    assert not isinstance(weights.lm_head, PackedWeight)  # plain float32: a matrix like any other, in the file
    assert weights.num_bytes() < 4 * sum(parameter.numel() for parameter in quantized.model.parameters())


@pytest.mark.clause("MD-PACK-4")
def test_a_backend_that_takes_no_packed_form_gets_dense_matrices(
    make_quantized: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend()
    offered = backend.capabilities()
    offered.extra_capabilities["quantized_linear"] = ["q4_0"]
    monkeypatch.setattr(backend, "capabilities", lambda: offered)
    with open_checkpoint(make_quantized("awq").write()) as checkpoint:
        weights = read_decoder_weights(checkpoint, backend, packed=True)
        dense = read_decoder_weights(checkpoint, make_backend())
    assert weights.num_bytes() == dense.num_bytes()


@pytest.mark.clause("MD-PACK-6")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("label", ["Q4_1", "Q6_K", "F16", "F32"])
def test_numbers_that_are_not_finite_are_reported_by_name(label: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, label, tied=False)
    reader = gguf.GGUFReader(path)
    tensor = next(each for each in reader.tensors if each.name == "blk.1.ffn_down.weight")
    width = FORMATS[label].block_bytes
    bad = encode(label, np.array([np.nan])) if width < 8 else np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    start = int(tensor.data_offset) + {"Q6_K": 208}.get(label, 0)
    del reader, tensor
    content = bytearray(path.read_bytes())
    content[start : start + len(bad)] = bad.tobytes()
    path.write_bytes(content)
    named = r"layers\.1\.mlp\.down_proj\.weight: got .* at \[0, 0\] of"
    with open_checkpoint(path) as checkpoint, pytest.raises(InvalidFormatError, match=named):
        read_decoder_weights(checkpoint, make_backend(), packed=packed)


@pytest.mark.clause("MD-PACK-1")
def test_matrices_lie_in_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "Q8_0", tied=False)
    with open_checkpoint(path) as checkpoint:
        down = checkpoint.packed_matrix("model.layers.0.mlp.down_proj.weight")
        again = checkpoint.packed_matrix("model.layers.0.mlp.down_proj.weight")
        assert np.shares_memory(down.packed, again.packed)
        assert not down.packed.flags.writeable
        assert checkpoint.packed_matrix("model.norm.weight") is None
        with pytest.raises(NotFoundError, match="'absent'"):
            checkpoint.packed_matrix("absent")


@pytest.mark.clause("MD-PACK-3")
def test_token_rows_are_decoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    model = write_gguf(path, "Q5_1", tied=True)
    backend = make_backend()
    with open_checkpoint(path) as checkpoint:
        weights = read_decoder_weights(checkpoint, backend, packed=True)
    asked: list[int] = []
    decode = quant_matrix.decode
    monkeypatch.setattr(
        quant_matrix, "decode", lambda name, rows, *out: (asked.append(len(rows)), decode(name, rows))[1]
    )
    rows = matrix_rows(backend.kernel_ops().linear_ops(), weights.embedding, [3, 39, 3])
    assert asked == [3]
    assert rows.to_numpy().tobytes() == model.model.embed_tokens.weight.detach().numpy()[[3, 39, 3]].tobytes()
    with pytest.raises(InvalidParameterError, match="id 40, expected 0 <= id < 40"):
        matrix_rows(backend.kernel_ops().linear_ops(), weights.embedding, [0, 40])


@pytest.mark.clause("MD-PACK-1", "MD-PACK-2", "MD-PACK-3")
def test_parts_of_several_formats_make_one_matrix() -> None:
    """Rows of Q4_0, of plain float32, of bfloat16: products and look-ups go to the part that has the row."""
    rng = np.random.default_rng(5)
    backend = make_backend()
    linear, factory = backend.kernel_ops().linear_ops(), backend.tensor_factory()
    stored = [RowMatrix(encode(name, rng.standard_normal((3, 64))), name) for name in ("Q4_0", "F32", "BF16")]
    parts = [packed_part(each, factory) for each in stored]
    parts[1] = PackedPart(factory.from_numpy(stored[1].packed.view("<f4")), None, stored[1])
    weight = PackedWeight(tuple(parts), DataType.FP32, backend.tensor_ops(), factory)
    whole = np.concatenate([each.rows(0, 3) for each in stored])
    assert (weight.shape(), weight.dtype()) == ((9, 64), DataType.FP32)
    assert weight.size_bytes() == sum(each.packed.nbytes for each in stored)
    x = np.eye(64, dtype=np.float32)[None]
    assert np.array_equal(apply_matrix(linear, factory.from_numpy(x), weight).to_numpy(), whole.T[None])
    assert np.array_equal(matrix_rows(linear, weight, [8, 0, 4, 4]).to_numpy(), whole[[8, 0, 4, 4]])
    for bad in (-1, 9):
        with pytest.raises(InvalidParameterError, match="id"):
            matrix_rows(linear, weight, [0, bad])


@pytest.mark.clause("MD-PACK-2", "BK-TORCH-39")
@pytest.mark.parametrize("label", ["F16", *BLOCKS])
def test_another_backend_takes_the_forms_it_lists(label: str, tmp_path: Path) -> None:
    """torch takes every form as it lies in the file, and prefers the same tokens."""
    path = tmp_path / "model.gguf"
    exact, allowed = allowance(write_gguf(path, label, tied=False))
    found, weights = logits(path, packed=True, backend=load_backend("torch"))
    assert np.abs(found - exact).max() <= allowed
    assert isinstance(weights.layers[0].down, PackedWeight)
    assert np.array_equal(found.argmax(-1), logits(path, packed=True)[0].argmax(-1))


@pytest.mark.clause("MD-PACK-2", "BK-TORCH-39")
def test_another_backend_takes_quantised_directories(quantized: Any) -> None:
    path = quantized.write()
    exact, allowed = allowance(quantized.model)
    found, weights = logits(path, packed=True, backend=load_backend("torch"))
    assert np.abs(found - exact).max() <= allowed
    assert isinstance(weights.layers[0].down, PackedWeight)
    assert np.array_equal(found.argmax(-1), logits(path, packed=True)[0].argmax(-1))
