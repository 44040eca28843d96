"""GPTQ's packed layers as plain weights: both zero conventions, act order, every number of bits (D-53, D-75, D-76)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from ferrum_ref.errors import InvalidFormatError, ModelError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.weights import WeightFormat, WeightSource
from ferrum_ref.types.devices import DataType
from ferrum_ref.weights.gptq import GptqSettings, dequantize_gptq, gptq_settings

Make = Callable[..., Any]


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers as 32-bit words, lowest bits first: plain integer arithmetic on one long number per row."""
    words = []
    for row in numbers:
        total = sum(int(number) << (bits * place) for place, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(total >> (32 * place)) & 0xFFFFFFFF for place in range(count)])
    return np.array(words, np.uint32).view(np.int32)


def layer(num_in: int, num_out: int, num_groups: int, bits: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    quanta = rng.integers(0, 2**bits, (num_in, num_out))
    zeros = rng.integers(0, 2**bits, (num_groups, num_out))
    return {
        "quanta": quanta,
        "zeros": zeros,
        "qweight": np.ascontiguousarray(pack(quanta.T, bits).T),
        "qzeros": pack(zeros, bits),
        "scales": rng.uniform(0.001, 0.1, (num_groups, num_out)).astype(np.float16),
    }


def by_hand(parts: dict[str, np.ndarray], groups: list[int], offset: int) -> np.ndarray:
    """w[n, k] = (q[k, n] - (z[g(k), n] + offset)) * s[g(k), n], one element at a time."""
    num_in, num_out = parts["quanta"].shape
    out = np.empty((num_out, num_in), np.float32)
    for k in range(num_in):
        for n in range(num_out):
            zero = int(parts["zeros"][groups[k], n]) + offset
            out[n, k] = np.float32(int(parts["quanta"][k, n]) - zero) * np.float32(parts["scales"][groups[k], n])
    return out


@pytest.mark.clause("WL-GPTQ-1", "WL-GPTQ-2")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_formula(bits: int, form: str, act_order: bool) -> None:
    parts = layer(64, 32, 4, bits)
    groups = [k // 16 for k in range(64)]
    g_idx = None
    if act_order:
        groups = np.random.default_rng(1).permutation(groups).tolist()
        g_idx = np.array(groups, np.int32)
    settings = GptqSettings(bits=bits, group_size=16, checkpoint_format=form)
    found = dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], g_idx, settings)
    assert found.shape == (32, 64)  # [N, K], a linear layer's weight (D-76)
    np.testing.assert_array_equal(found, by_hand(parts, groups, 0 if form == "gptq_v2" else 1))


@pytest.mark.clause("WL-GPTQ-1")
def test_the_zero_convention_on_one_number() -> None:
    """D-53: q = 9, stored zero 7, scale 0.5. "gptq" means zero 8 and gives 0.5; taken as it is, it would be 1.0."""
    parts = [
        np.array([[9]], np.int32).repeat(8, 1),
        np.array([[0x77777777]], np.int32),
        np.full((1, 8), 0.5, np.float16),
    ]
    first = dequantize_gptq(parts[0], parts[1], parts[2], None, GptqSettings(bits=4))
    second = dequantize_gptq(parts[0], parts[1], parts[2], None, GptqSettings(bits=4, checkpoint_format="gptq_v2"))
    assert (first[0, 0], second[0, 0]) == (0.5, 1.0)


@pytest.mark.clause("WL-GPTQ-2")
def test_act_order_on_one_layer() -> None:
    """D-53: with g_idx ignored, every row takes the scale of its place and not of its group."""
    parts = layer(16, 8, 2, 4)
    g_idx = np.arange(16, dtype=np.int32) % 2
    found = dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], g_idx, GptqSettings(group_size=8))
    ignored = dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], None, GptqSettings(group_size=8))
    np.testing.assert_array_equal(found, by_hand(parts, g_idx.tolist(), 1))
    assert not np.array_equal(found, ignored)


@pytest.mark.clause("WL-GPTQ-2")
def test_one_group_and_bits_from_the_shapes() -> None:
    for bits in (2, 4, 8):
        parts = layer(32, 16, 1, bits)
        settings = gptq_settings({"group_size": -1}, "q.json")
        found = dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], None, settings)
        np.testing.assert_array_equal(found, by_hand(parts, [0] * 32, 1))


@pytest.mark.clause("WL-GPTQ-2")
@pytest.mark.parametrize(
    "change",
    [
        {"qzeros": np.zeros((2, 5), np.int32)},
        {"qzeros": np.zeros((1, 1), np.int32)},
        {"scales": np.zeros((2, 9), np.float16)},
        {"scales": np.zeros((3, 8), np.float16)},
        {"scales": np.zeros(8, np.float16)},
        {"scales": np.zeros((0, 8), np.float16)},
        {"scales": np.zeros((2, 8), np.int32)},
        {"qweight": np.zeros((2, 8), np.float32)},
        {"qweight": np.zeros((2, 8, 1), np.int32)},
        {"g_idx": np.zeros(15, np.int32)},
        {"g_idx": np.full(16, 2, np.int32)},
        {"g_idx": np.full(16, -1, np.int32)},
    ],
)
def test_parts_that_do_not_fit(change: dict[str, np.ndarray]) -> None:
    parts = {**layer(16, 8, 2, 4), "g_idx": np.arange(16, dtype=np.int32) % 2, **change}
    with pytest.raises(ModelError, match="dequantize GPTQ"):
        dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], GptqSettings(bits=4))


@pytest.mark.clause("WL-GPTQ-3")
@pytest.mark.parametrize("nested", [False, True])
def test_settings(nested: bool) -> None:
    """D-75: AutoGPTQ's file has no key `method`, and group_size may be -1; upstream parses neither."""

    def settings(**facts: Any) -> GptqSettings:
        return gptq_settings({"quantization_config": facts, "model_type": "llama"} if nested else facts, "q.json")

    auto = settings(bits=4, group_size=128, desc_act=True, sym=True, damp_percent=0.01, true_sequential=True)
    assert auto == GptqSettings("gptq", 4, 128, True, True, "gptq")
    assert settings(quant_method="gptq", bits=8, group_size=-1, checkpoint_format="gptq_v2").zero_offset == 0
    assert settings(method="gptq").zero_offset == 1
    assert settings(group_size=-1).group_size is None
    for facts in ({"quant_method": "awq"}, {"method": 5}, {"checkpoint_format": "marlin"}, {"bits": 5}):
        with pytest.raises(UnsupportedError, match=r"read q\.json"):
            settings(**facts)
    for facts in (
        {"bits": "4"},
        {"bits": True},
        {"group_size": 0},
        {"group_size": 1.5},
        {"sym": 1},
        {"desc_act": None},
    ):
        with pytest.raises(InvalidFormatError, match=r"read q\.json"):
            settings(**facts)
    with pytest.raises(InvalidFormatError, match="expected an object"):
        gptq_settings({"quantization_config": 5}, "q.json")


def checkpoint(folder: Path, **configs: Any) -> tuple[dict[str, np.ndarray], WeightSource]:
    parts = layer(16, 8, 2, 4)
    tensors = {f"m.q_proj.{name}": parts[name] for name in ("qweight", "qzeros", "scales")}
    save_file({**tensors, "m.norm.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    for name, value in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return parts, WeightSource.File(str(folder), None)


@pytest.mark.clause("WL-GPTQ-4", "WL-GPTQ-3")
@pytest.mark.parametrize(
    ("configs", "offset"),
    [
        ({}, 1),
        ({"quantize_config": {"bits": 4, "group_size": 8, "checkpoint_format": "gptq_v2"}}, 0),
        ({"config": {"model_type": "llama"}}, 1),
        ({"config": {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}}}, 0),
    ],
)
def test_through_the_loader(
    configs: dict[str, Any], offset: int, loader: Any, spec: Make, load: Make, tmp_path: Path
) -> None:
    parts, source = checkpoint(tmp_path, **configs)
    found = load(loader, spec(source, (8, 16), name="m.q_proj.weight"))
    np.testing.assert_array_equal(found, by_hand(parts, [k // 8 for k in range(16)], offset))
    assert load(loader, spec(source, (2, 8), name="m.q_proj.qweight", dtype=DataType.INT32)).shape == (2, 8)
    assert load(loader, spec(source, (3,), name="m.norm.weight")).tolist() == [1, 1, 1]
    assert asyncio.run(loader.get_metadata(source)).tensors["m.q_proj.weight"] == [8, 16]


@pytest.mark.clause("WL-GPTQ-4")
def test_other_methods_keep_their_parts(loader: Any, spec: Make, load: Make, tmp_path: Path) -> None:
    _, source = checkpoint(tmp_path, quantize_config={"quant_method": "awq", "bits": 4})
    assert load(loader, spec(source, (2, 8), name="m.q_proj.qweight", dtype=DataType.INT32)).shape == (2, 8)
    with pytest.raises(NotFoundError):
        load(loader, spec(source, (8, 16), name="m.q_proj.weight"))


@pytest.mark.clause("WL-GPTQ-4")
def test_from_memory_and_over_http(loader: Any, site: Any, spec: Make, load: Make) -> None:
    parts = layer(16, 8, 2, 4)
    content = save({f"l.{name}": parts[name] for name in ("qweight", "qzeros", "scales")})
    groups = [k // 8 for k in range(16)]
    memory = WeightSource.Memory(content, WeightFormat.SafeTensors)
    np.testing.assert_array_equal(load(loader, spec(memory, (8, 16), name="l.weight")), by_hand(parts, groups, 1))
    config = {"bits": 4, "group_size": 8, "checkpoint_format": "gptq_v2"}
    site.files.update({"m/w.safetensors": content, "m/quantize_config.json": json.dumps(config).encode()})
    source = WeightSource.Url(site.url("m/w.safetensors"), {})
    np.testing.assert_array_equal(load(loader, spec(source, (8, 16), name="l.weight")), by_hand(parts, groups, 0))
    assert [seen.path for seen in site.log] == ["/m/w.safetensors", "/m/quantize_config.json"]
