"""The decode step over a GGUF file's matrices as they lie: of many types, stacked, tied; and the real model's."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.quant_schemes import QuantScheme
from ferrum_ref.interfaces.weight_parts import DecoderMatrix, WeightPart
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights

TYPES = {  # q, k and v, and gate and up, of several types: parts of one matrix
    "self_attn.q_proj": ("attn_q", "Q4_K"),
    "self_attn.k_proj": ("attn_k", "Q8_0"),
    "self_attn.v_proj": ("attn_v", "Q6_K"),
    "self_attn.o_proj": ("attn_output", "Q4_1"),
    "mlp.gate_proj": ("ffn_gate", "Q5_0"),
    "mlp.up_proj": ("ffn_up", "F16"),
    "mlp.down_proj": ("ffn_down", "Q5_1"),
    "embed_tokens": ("token_embd", "Q4_0"),
    "lm_head": ("output", "Q6_K"),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "norm": "output_norm"}
HEADS = {"attn_q": 8, "attn_k": 4}
TOKENS = np.random.default_rng(6).integers(0, 41, 20).tolist()


def packed_rows(values: np.ndarray, name: str) -> np.ndarray:
    """By gguf where it encodes; else random bytes with small scales."""
    kind = gguf.GGMLQuantizationType[name]
    try:
        return np.ascontiguousarray(gguf.quantize(values, kind)).view(np.uint8)
    except NotImplementedError:
        elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (values.shape[0], values.shape[1] // elements, num_bytes)
    packed = np.random.default_rng(values.shape[0]).integers(0, 256, shape, dtype=np.uint8)
    for start in {"Q6_K": (208,), "Q4_K": (0, 2)}[name]:
        packed[..., start : start + 2] = np.array([3e-5], np.float16).view(np.uint8)
    return packed.reshape(len(values), -1)


def write(path: Path, tied: bool) -> transformers.LlamaForCausalLM:
    """A llama of TYPES, and the same model with gguf's numbers."""
    sizes = {"hidden_size": 256, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=41, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=tied, **sizes
    )
    model, writer = transformers.LlamaForCausalLM(config).eval(), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(352)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            words = name.removesuffix(".weight").removeprefix("model.").split(".", 2)
            place, base = (f"blk.{words[1]}.", words[2]) if words[0] == "layers" else ("", words[0])
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                writer.add_tensor(f"{place}{NORMS[base]}.weight", parameter.numpy().copy())
                continue
            stored, type_name = TYPES[base]
            kind = gguf.GGMLQuantizationType[type_name]
            packed = packed_rows(parameter.numpy(), type_name)
            values = np.asarray(gguf.dequantize(packed, kind), np.float32)
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
            if heads := HEADS.get(stored):  # llama.cpp's order: the halves of a head become neighbours
                half = len(packed) // heads // 2
                packed = packed.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(packed.shape)
            writer.add_tensor(f"{place}{stored}.weight", np.ascontiguousarray(packed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def read(path: Path, backend: Any, packed: bool = True) -> DecoderTransformerWeights:
    with open_checkpoint(path) as checkpoint:
        weights = read_decoder_weights(checkpoint, backend, packed=packed)
        return DecoderTransformerWeights.of_decoder(Decoder(checkpoint.config, weights, backend))


@pytest.fixture
def steps(backend: Any) -> Callable[..., np.ndarray]:
    """steps(weights, format): the logits (T, V) after each of TOKENS, from an empty cache."""

    def run(weights: Any, weights_format: str = "stored", tokens: Any = TOKENS) -> np.ndarray:
        decode = backend.make_decode_backend(weights, weights_format=weights_format)
        config = weights.config()
        empty = backend.tensor_factory().from_numpy(np.zeros((0, config.num_kv_heads, config.head_dim), np.float32))
        decode.init_kv_cache("a", [(empty, empty)] * config.num_layers, 0)
        rows = [decode.decode_step(token, position, "a").to_numpy()[0, 0] for position, token in enumerate(tokens)]
        return np.array(rows)

    return run


@pytest.mark.clause("BK-NCPU-23", "BK-NCPU-24", "TW-PARTS-1", "TW-PARTS-2")
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_many_types(backend: Any, steps: Any, tmp_path: Path, tied: bool) -> None:
    """Against transformers in float64 on gguf's numbers, allowed four times what its float32 errs by."""
    model = write(tmp_path / "model.gguf", tied)
    weights = read(tmp_path / "model.gguf", backend)
    found = steps(weights)
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        narrow = model.float()(ids).logits[0].double()
        exact = model.double()(ids).logits[0]
    assert np.abs(found - exact.numpy()).max() <= 4 * float((narrow - exact).abs().max())
    assert np.array_equal(found, steps(weights, "float32"))
    assert np.array_equal(found, steps(read(tmp_path / "model.gguf", backend, packed=False)))


@pytest.mark.clause("BK-NCPU-23")
def test_the_name_tells_the_formats(backend: Any, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", True)
    weights = read(tmp_path / "model.gguf", backend)
    named = {name: backend.make_decode_backend(weights, weights_format=name).name() for name in ("float32", "int8")}
    assert backend.make_decode_backend(weights).name() == (
        "numba-cpu decode step, float16 and q4_0 and q4_1 and q4_k and q5_0 and q5_1 and q6_k and q8_0 weights"
    )
    assert named == {name: f"numba-cpu decode step, {name} weights" for name in named}


@pytest.mark.clause("BK-NCPU-23")
def test_quantising_what_is_packed(backend: Any, steps: Any, tmp_path: Path) -> None:
    """The numbers count, not how they are stored."""
    write(tmp_path / "model.gguf", False)
    packed, dense = read(tmp_path / "model.gguf", backend), read(tmp_path / "model.gguf", backend, packed=False)
    for name in ("int8", "q8_0", "q4_0"):
        assert np.array_equal(steps(packed, name, TOKENS[:3]), steps(dense, name, TOKENS[:3]))


@pytest.mark.clause("BK-NCPU-23")
def test_nothing_is_copied_or_expanded(backend: Any, steps: Any, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", False)
    weights = read(tmp_path / "model.gguf", backend)
    backend.make_decode_backend(weights)  # compiled before it is measured
    tracemalloc.start()
    try:
        decode = backend.make_decode_backend(weights)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stored = sum(
        part.tensor.to_numpy().nbytes
        for matrix in DecoderMatrix
        for layer in range(2 if matrix not in (DecoderMatrix.EMBED, DecoderMatrix.LM_HEAD) else 1)
        for part in weights.matrix_parts(matrix, layer)
        if matrix is not DecoderMatrix.EMBED
    )
    assert decode.weights_bytes == stored
    assert held < stored / 8
    before = steps(weights, tokens=[5])
    (head,) = weights.matrix_parts(DecoderMatrix.LM_HEAD)
    changed = head.tensor.to_numpy().copy()
    changed[:, 192:208] ^= 0x80  # sc - 128 for sc: the tensor's own bytes are read
    other = WithHead(weights, replace(head, tensor=backend.tensor_factory().from_numpy(changed)))
    made = steps(other, tokens=[5])
    assert not np.array_equal(made, before)
    changed[:, 192:208] ^= 0x80
    assert np.array_equal(steps(other, tokens=[5]), before)


class WithHead:
    """Weights whose output matrix is another part."""

    def __init__(self, weights: DecoderTransformerWeights, head: WeightPart) -> None:
        self._weights, self._head = weights, head

    def matrix_parts(self, matrix: DecoderMatrix, layer: int = 0) -> tuple[WeightPart, ...]:
        return (self._head,) if matrix is DecoderMatrix.LM_HEAD else self._weights.matrix_parts(matrix, layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)


@pytest.mark.clause("BK-NCPU-23")
def test_a_form_that_is_not_taken(backend: Any, tensor: Any, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", True)
    weights = read(tmp_path / "model.gguf", backend)
    part = WeightPart(tensor(np.zeros((41, 256)), np.uint8), QuantScheme.Fp8("e4m3", tensor([1.0])), (41, 256))
    with pytest.raises(UnsupportedError, match="decode backend: scheme: got QuantFp8"):
        backend.make_decode_backend(WithHead(weights, part))


@pytest.mark.clause("BK-NCPU-23", "BK-NCPU-18")
def test_threads_change_no_bit_of_parts(backend: Any, steps: Any, tmp_path: Path, threads: Any) -> None:
    """Tasks that begin in one part and end in the next."""
    write(tmp_path / "model.gguf", False)
    weights = read(tmp_path / "model.gguf", backend)
    threads(1)
    alone = steps(weights)
    threads(2)
    assert np.array_equal(steps(weights), alone)


@pytest.mark.clause("BK-NCPU-23")
def test_a_task_does_its_own_rows_and_no_others() -> None:
    """Rows 3 to 8 of a matrix whose first five rows are Q4_0 and whose last seven are float32."""
    from ferrum_numba.cpu.packing import as_stored, stored
    from ferrum_numba.cpu.stepping import project_rows

    rng = np.random.default_rng(7)
    x, dense = rng.normal(size=32).astype(np.float32), rng.normal(size=(7, 32)).astype(np.float32)
    packed = gguf.quantize(rng.normal(size=(5, 32)).astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
    matrices = as_stored("test", packed, QuantScheme.Q4_0(32)), stored(dense, "stored")
    parts = np.array([(*matrices[0].fields(), 0, 5), (*matrices[1].fields(), 5, 12)])
    weight = np.concatenate([gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_0), dense]).astype(np.float64)
    out = np.full(12, np.nan, np.float32)
    project_rows(parts.ctypes.data, 2, 3, 9, x.ctypes.data, out.ctypes.data, 32, 12)
    bound = 33 * 2.0**-24 / (1 - 33 * 2.0**-24) * (np.abs(weight) @ np.abs(x))
    assert np.isnan(out).tolist() == [row not in range(3, 9) for row in range(12)]
    assert np.all(np.abs(out - weight @ x)[3:9] <= bound[3:9])


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.clause("BK-NCPU-22", "BK-NCPU-23", "BK-NCPU-24")
def test_smollm2_says_the_same_as_the_reference_packed(backend: Any, steps: Any, smollm2_path: Any) -> None:
    """The decoder over the kernels, and the decode step: greedy tokens of the reference's packed run."""
    from ferrum_ref.assembly import load_model

    reference = load_model(smollm2_path, packed=True)
    ours = load_model(smollm2_path, backend, packed=True)
    prompt = reference.tokenizer.encode("The three laws of thermodynamics are", add_special=False)

    def greedy(llm: Any) -> list[int]:
        logits, tokens = llm.prefill("a", prompt), []
        for position in range(len(prompt), len(prompt) + 24):
            tokens.append(int(logits.argmax()))
            logits = llm.decode("a", tokens[-1], position)
        return tokens

    wanted = greedy(reference.new_llm())
    assert greedy(ours.new_llm()) == wanted
    weights = DecoderTransformerWeights.of_decoder(ours.decoder)
    found = steps(weights, tokens=[*prompt, *wanted])
    assert found[len(prompt) - 1 : -1].argmax(axis=1).tolist() == wanted
    decode = backend.make_decode_backend(weights)
    assert decode.name() == "numba-cpu decode step, q4_1 and q8_0 weights"
    assert decode.weights_bytes < Path(smollm2_path).stat().st_size
    assert np.array_equal(found[:4], steps(weights, "float32", prompt[:4]))
