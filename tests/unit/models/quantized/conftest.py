"""Quantised Hugging Face directories, written by hand: bits are packed here by shifts, not by the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: nibble i of a word is output NIBBLES[i]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def stream(elements: np.ndarray, bits: int) -> np.ndarray:
    """Columns of integers as 32-bit words down each column, one continuous stream of bits, the lowest first."""
    rows = -(-elements.shape[0] * bits // 32)
    words = [[0] * elements.shape[1] for _ in range(rows)]
    for k in range(elements.shape[0]):
        for n in range(elements.shape[1]):
            for bit in range(bits):
                place = k * bits + bit
                words[place // 32][n] |= (int(elements[k, n]) >> bit & 1) << place % 32
    return np.array(words, np.uint32).view(np.int32)


class Written:
    """A quantised module: its tensors, and the numbers they mean in float64."""

    def __init__(self, tensors: dict[str, np.ndarray | torch.Tensor], weight: np.ndarray) -> None:
        self.tensors, self.weight = tensors, weight


def gptq(shape: tuple[int, int], rng: np.random.Generator, bits: int, group: int, order: bool, offset: int) -> Written:
    """W[n, k] = (q[k, n] - z[g(k), n] - offset) s[g(k), n]."""
    outputs, inputs = shape
    size = inputs if group == -1 else group
    g_idx = rng.permutation(inputs) // size if order else np.arange(inputs) // size
    groups, top = inputs // size, 1 << bits
    q, z = rng.integers(0, top, (inputs, outputs)), rng.integers(0, top - offset, (groups, outputs))
    s = (rng.uniform(0.2, 1, (groups, outputs)) / top).astype(np.float16)
    weight = ((q - z[g_idx] - offset) * s.astype(np.float64)[g_idx]).T
    tensors = {"qweight": stream(q, bits), "qzeros": np.ascontiguousarray(stream(z.T, bits).T), "scales": s}
    return Written(tensors | ({"g_idx": g_idx.astype(np.int32)} if order else {}), weight)


def awq(shape: tuple[int, int], rng: np.random.Generator, group: int) -> Written:
    outputs, inputs = shape
    size = inputs if group == -1 else group
    q, z = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (inputs // size, outputs))
    s = (rng.uniform(0.2, 1, z.shape) / 16).astype(np.float16)

    def words(nibbles: np.ndarray) -> np.ndarray:
        found = np.zeros((len(nibbles), outputs // 8), np.uint32)
        for place, output in enumerate(NIBBLES):
            found |= nibbles[:, output::8].astype(np.uint32) << np.uint32(4 * place)
        return found.view(np.int32)

    g = np.arange(inputs) // size
    return Written({"qweight": words(q), "qzeros": words(z), "scales": s}, ((q - z[g]) * s.astype(np.float64)[g]).T)


def fp8(shape: tuple[int, int], rng: np.random.Generator, block: tuple[int, int] | None, name: str) -> Written:
    codes = torch.from_numpy(rng.standard_normal(shape)).to(torch.float8_e4m3fn)
    grid = (1,) if block is None else tuple(-(-extent // side) for extent, side in zip(shape, block))
    scale = torch.from_numpy(rng.uniform(0.05, 0.2, grid)).float()
    wide = scale.double().numpy()
    if block is not None:
        wide = np.repeat(np.repeat(wide, block[0], 0), block[1], 1)[: shape[0], : shape[1]]
    return Written({"weight": codes, name: scale}, codes.double().numpy() * wide)


def pack_quantized(shape: tuple[int, int], rng: np.random.Generator, bits: int, group: int, symmetric: bool) -> Written:
    outputs, inputs = shape
    size = inputs if group == -1 else group
    groups, half = inputs // size, 1 << (bits - 1)
    q = rng.integers(-half, half, shape)
    z = np.zeros((outputs, groups), np.int64) if symmetric else rng.integers(-half, half, (outputs, groups))
    s = torch.from_numpy(rng.uniform(0.2, 1, (outputs, groups)) / half).bfloat16()
    tensors: dict[str, Any] = {
        "weight_packed": np.ascontiguousarray(stream((q + half).T, bits).T),
        "weight_scale": s,
        "weight_shape": np.array(shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = stream(z + half, bits)
    g = np.arange(inputs) // size
    return Written(tensors, (q - z[:, g]) * s.double().numpy()[:, g])


def int_quantized(shape: tuple[int, int], rng: np.random.Generator) -> Written:
    q = rng.integers(-128, 128, shape).astype(np.int8)
    s = torch.from_numpy(rng.uniform(0.2, 1, (shape[0], 1)) / 128).float()
    return Written({"weight": q, "weight_scale": s}, q * s.double().numpy())


def compressed(layout: str, bits: int, group: int | None, kind: str = "int", symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": "group" if group else "channel"}
    described = {"targets": ["Linear"], "weights": weights | {"group_size": group}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": described}}


KINDS: dict[str, tuple[dict[str, Any], Callable[..., Written]]] = {
    "gptq 4": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        lambda shape, rng: gptq(shape, rng, 4, 32, False, 1),
    ),
    "gptq 3 act-order": (
        {"quant_method": "gptq", "bits": 3, "group_size": 16, "desc_act": True},
        lambda shape, rng: gptq(shape, rng, 3, 16, True, 1),
    ),
    "gptq 8 v2": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        lambda shape, rng: gptq(shape, rng, 8, -1, False, 0),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        lambda shape, rng: awq(shape, rng, 32),
    ),
    "fp8 blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        lambda shape, rng: fp8(shape, rng, (32, 32), "weight_scale_inv"),
    ),
    "fp8 tensor": (
        compressed("float-quantized", 8, None, "float"),
        lambda shape, rng: fp8(shape, rng, None, "weight_scale"),
    ),
    "int4 packed": (
        compressed("pack-quantized", 4, 32),
        lambda shape, rng: pack_quantized(shape, rng, 4, 32, True),
    ),
    "int4 packed asymmetric": (
        compressed("pack-quantized", 4, 16, symmetric=False),
        lambda shape, rng: pack_quantized(shape, rng, 4, 16, False),
    ),
    "int8 packed": (compressed("pack-quantized", 8, None), lambda shape, rng: pack_quantized(shape, rng, 8, -1, True)),
    "int8": (compressed("int-quantized", 8, None), lambda shape, rng: int_quantized(shape, rng)),
}


class Directory:
    """A tiny Llama whose projections are quantised, and the same model with the numbers they mean."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.quantization = path, KINDS[kind][0]
        self.model = llama()
        self.weights: dict[str, np.ndarray] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        rng = np.random.default_rng(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "_proj.weight" not in name:
                    self.tensors[name] = parameter.detach().clone()
                    continue
                module = name.removesuffix(".weight")
                written = KINDS[kind][1](tuple(parameter.shape), rng)
                self.weights[name] = written.weight
                parameter.copy_(torch.from_numpy(written.weight.astype(np.float32)))
                for ending, tensor in written.tensors.items():
                    self.tensors[f"{module}.{ending}"] = torch.as_tensor(tensor)

    def write(self, **changes: Any) -> Path:
        """config.json and model.safetensors; `changes` to the quantization_config."""
        config = {**self.model.config.to_dict(), "quantization_config": {**self.quantization, **changes}}
        self.path.mkdir(exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.path / "model.safetensors")
        return self.path


@pytest.fixture
def make_quantized(tmp_path: Path) -> Callable[[str], Directory]:
    """A directory of one of KINDS, not yet written."""
    return lambda kind: Directory(tmp_path / "quantized", kind)


@pytest.fixture(params=KINDS)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    """A directory of each kind in turn, not yet written."""
    return Directory(tmp_path / "quantized", request.param)
