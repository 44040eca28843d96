"""Values and bounds from outside: the files read by safetensors for torch, the results by torch and gguf in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ferrum_ref.vectors.schema import Manifest, Vector

Tensors = Mapping[str, torch.Tensor]
Given = Mapping[str, Any]
NEGLIGIBLE = 2.0**-20  # of a bound: two float64 formulas differ by far less


@pytest.fixture(scope="module")
def tensors(vector_set: Path, manifest: Manifest) -> Tensors:
    return {
        name: tensor
        for entry in manifest.operations.values()
        for name, tensor in load_file(vector_set / entry.file).items()
    }


def vectors_of(manifest: Manifest, tensors: Tensors, operation: str) -> Iterator[tuple[Vector, Given]]:
    """Each vector of an operation with its inputs, floating-point ones in float64."""
    for vector in manifest.vectors:
        if vector.operation == operation:
            given = {one.name: tensors[vector.input_tensor(one.name)] for one in vector.inputs}
            yield vector, {name: one.double() if one.is_floating_point() else one for name, one in given.items()}


def agree(vector: Vector, name: str, result: torch.Tensor, tensors: Tensors) -> bool:
    """The stored value is `result`, but for float64's own roundings."""
    value, bound = tensors[vector.value_tensor(name)], tensors[vector.bound_tensor(name)]
    assert value.shape == result.shape
    near = (value == result) | ((value - result).abs() <= NEGLIGIBLE * bound) | (value.isnan() & result.isnan())
    return bool(near.all())


def rms_norm(given: Given, parameters: Given) -> torch.Tensor:
    return torch.nn.functional.rms_norm(given["x"], given["weight"].shape, given["weight"], parameters["eps"])


def rms_norm_residual(given: Given, parameters: Given) -> torch.Tensor:
    return rms_norm({**given, "x": given["x"] + given["residual"]}, parameters)


def layer_norm(given: Given, parameters: Given) -> torch.Tensor:
    weight = given["weight"]
    return torch.nn.functional.layer_norm(given["x"], weight.shape, weight, given.get("bias"), parameters["eps"])


def rotary_embedding(given: Given, parameters: Given) -> torch.Tensor:
    angles = torch.complex(given["cos"], given["sin"])[given["positions"]][:, None, :]
    width = given["x"].shape[-1] // 2
    turned = torch.complex(given["x"][..., :width], given["x"][..., width:]) * angles
    return torch.cat([turned.real, turned.imag], -1)


def attention(given: Given, parameters: Given) -> torch.Tensor:
    """With a mask built position by position, grouped heads repeated, and the sink as one more column."""
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = parameters["softmax_scale"] * q @ k.transpose(-1, -2)
    if cap := parameters["logit_softcap"]:
        scores = cap * torch.tanh(scores / cap)
    num_tokens, num_keys, window = q.shape[2], k.shape[2], parameters["sliding_window"] or k.shape[2] + 1
    seen = torch.ones(num_tokens, num_keys, dtype=torch.bool)
    if parameters["causal"]:
        for token in range(num_tokens):
            for key in range(num_keys):
                seen[token, key] = token + num_keys - num_tokens - window < key <= token + num_keys - num_tokens
    scores = scores.masked_fill(~seen, -math.inf)
    sinks = given.get("sinks", torch.full((q.shape[1],), -math.inf, dtype=torch.float64))
    columns = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(columns, -1)[..., :-1].masked_fill(~seen.any(-1)[:, None], 0.0)
    return (weights @ v).transpose(1, 2)


def paged_attention(given: Given, parameters: Given) -> torch.Tensor:
    q = given["q"] if given["q"].ndim == 4 else given["q"][:, None]
    rows = []
    for batch, length in enumerate(given["lens"].tolist()):
        places = [divmod(position, given["k_cache"].shape[1]) for position in range(length)]
        gathered = {
            name: torch.stack([given[f"{name}_cache"][given["table"][batch, block], row] for block, row in places])[
                None
            ]
            if places
            else given["k_cache"][:0].reshape(1, 0, *given["k_cache"].shape[2:])
            for name in "kv"
        }
        rows.append(attention({**given, "q": q[batch : batch + 1], **gathered}, parameters))
    return torch.cat(rows).reshape(given["q"].shape)


def linear(given: Given, parameters: Given) -> torch.Tensor:
    return torch.nn.functional.linear(given["x"], given["weight"])


def quantized_linear(given: Given, parameters: Given) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[parameters["format"]]
    weight = gguf.dequantize(given["packed"].numpy(), kind)
    return linear({"x": given["x"], "weight": torch.from_numpy(weight).double()}, parameters)


FORMULAS = {
    "rms_norm": rms_norm,
    "rms_norm_residual": rms_norm_residual,
    "layer_norm": layer_norm,
    "rotary_embedding": rotary_embedding,
    "attention": attention,
    "paged_attention": paged_attention,
    "silu_mul": lambda given, _: torch.nn.functional.silu(given["gate"]) * given["up"],
    "gelu": lambda given, _: torch.special.log_ndtr(given["x"]).exp() * given["x"],
    "gelu_tanh": lambda given, _: given["x"] * torch.sigmoid(2 * _inner(given["x"])),
    "softmax": lambda given, parameters: torch.softmax(given["x"], parameters["axis"]),
    "linear": linear,
    **{f"quantized_linear_{name}": quantized_linear for name in ("q4_0", "q8_0", "q4_k")},
}


def _inner(x: torch.Tensor) -> torch.Tensor:
    return math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)


@pytest.mark.clause("GV-BOUND-1", "GV-FORMAT-3")
@pytest.mark.parametrize("operation", FORMULAS)
def test_values_are_those_of_another_float64_formula(operation: str, manifest: Manifest, tensors: Tensors) -> None:
    names = []
    for vector, given in vectors_of(manifest, tensors, operation):
        finite = {name: one for name, one in given.items() if "cache" not in name}
        assert all(one.dtype in (torch.float64, torch.int64, torch.uint8) for one in finite.values())
        result = FORMULAS[operation](given, vector.parameters)
        assert agree(vector, vector.outputs[0].name, result, tensors), vector.name
        names.append(vector.name)
    assert len(names) >= 3


@pytest.mark.clause("GV-BOUND-1")
def test_the_second_output_of_the_residual_norm_is_the_sum(manifest: Manifest, tensors: Tensors) -> None:
    for vector, given in vectors_of(manifest, tensors, "rms_norm_residual"):
        assert [output.name for output in vector.outputs] == ["y", "residual"]
        assert torch.equal(tensors[vector.value_tensor("residual")], given["x"] + given["residual"])


@pytest.mark.clause("GV-BOUND-1", "GV-BOUND-3", "GV-FORMAT-3")
def test_exact_outputs_are_the_same_bits(manifest: Manifest, tensors: Tensors) -> None:
    for vector, given in vectors_of(manifest, tensors, "argmax"):
        logits = given["logits"].flatten().tolist()
        assert tensors[vector.value_tensor("index")].item() == logits.index(max(logits))
    for operation, output in (("embedding", "y"), ("write_kv", "cache")):
        for vector, _ in vectors_of(manifest, tensors, operation):
            value = tensors[vector.value_tensor(output)]
            assert vector.value_tensor(output).replace("value", "bound") not in tensors
            given = {one.name: tensors[vector.input_tensor(one.name)] for one in vector.inputs}
            if operation == "embedding":
                expected = given["table"][given["ids"]]
            else:
                expected = given["cache"].clone()
                for row, slot in zip(given["rows"], given["slots"].tolist(), strict=True):
                    if slot >= 0:
                        expected.reshape(-1, *expected.shape[2:])[slot] = row
            assert value.dtype == expected.dtype
            bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()]
            assert torch.equal(value.view(bits), expected.view(bits)), vector.name


def gamma(count: int, unit: float = 2.0**-24) -> float:
    return count * unit / (1.0 - count * unit)


@pytest.mark.clause("GV-BOUND-2")
def test_the_bound_of_linear_is_the_one_derived_by_hand(manifest: Manifest, tensors: Tensors) -> None:
    """bf16: products are exact, K - 1 additions, one store. fp32: K roundings meet a product, and none the store."""
    checked = set()
    for vector, given in vectors_of(manifest, tensors, "linear"):
        if vector.storage == "fp16" or "one row is NaN" in vector.flags or not given["x"].shape[-1]:
            continue
        terms = given["x"].shape[-1]
        magnitude = torch.nn.functional.linear(given["x"].abs(), given["weight"].abs()).numpy()
        value = np.abs(tensors[vector.value_tensor("y")].numpy())
        bound = tensors[vector.bound_tensor("y")].numpy()
        if vector.storage == "bf16":
            by_hand = (1 + 2.0**-8) * gamma(terms - 1) * magnitude + 2.0**-8 * value + 2.0**-134
        else:
            by_hand = gamma(terms) * magnitude
        np.testing.assert_allclose(bound, by_hand, rtol=1e-9, atol=1e-36)
        checked.add(vector.storage)
    assert checked == {"bf16", "fp32"}


@pytest.mark.clause("GV-BOUND-2")
def test_the_right_result_rounded_once_passes_and_a_bound_away_does_not(manifest: Manifest, tensors: Tensors) -> None:
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for vector in manifest.vectors:
        for output in vector.outputs:
            if output.exact:
                continue
            value, bound = tensors[vector.value_tensor(output.name)], tensors[vector.bound_tensor(output.name)]
            finite = value.isfinite()
            rounded = value.to(types[output.dtype]).double()
            assert bool(((rounded - value).abs() <= bound)[finite].all()), vector.name
