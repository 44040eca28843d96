"""Quantised Hugging Face directories mean what an independent formula says, packed and dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.inspection import describe

Q = "model.layers.0.self_attn.q_proj"
LABELS = {"gptq 4": "GPTQ4", "awq": "AWQ4", "fp8 blocks": "FP8", "int4 packed": "INT4", "int8": "INT8"}


@pytest.mark.clause("MD-HFQ-3", "MD-HFQ-4", "MD-HFQ-5", "MD-HFQ-6", "MD-HFQ-7")
def test_matrices_have_canonical_names_and_the_numbers_of_the_formula(quantized: Any) -> None:
    with open_checkpoint(quantized.write()) as checkpoint:
        assert set(checkpoint.tensors) == set(dict(quantized.model.named_parameters()))
        for name, wanted in quantized.weights.items():
            read = checkpoint.read(name)
            assert read.dtype == np.float32
            assert np.array_equal(read, wanted.astype(np.float32))  # one rounding of the exact product
            packed = checkpoint.packed_matrix(name)
            assert packed is not None
            assert packed.rows(0, packed.shape[0]).tobytes() == read.tobytes()
        assert np.array_equal(checkpoint.read("lm_head.weight"), quantized.tensors["lm_head.weight"].numpy())


@pytest.mark.clause("MD-HFQ-1", "MD-HFQ-3")
@pytest.mark.parametrize("kind", LABELS)
def test_the_dtype_says_the_format(kind: str, make_quantized: Callable[[str], Any]) -> None:
    directory = make_quantized(kind)
    with open_checkpoint(directory.write()) as checkpoint:
        entry = checkpoint.tensors[f"{Q}.weight"]
        stored = [t for name, t in directory.tensors.items() if name.startswith(f"{Q}.")]
        assert (entry.dtype, entry.shape) == (LABELS[kind], (64, 64))
        assert entry.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)
        facts = describe(checkpoint)
        assert {share["dtype"] for share in facts["formats"]} == {LABELS[kind], "F32"}
        asked = "fp8, dynamic" if kind == "fp8 blocks" else "float"
        assert (facts["quantization"]["method"], facts["quantization"]["activations"]) == (
            directory.quantization["quant_method"],
            asked,
        )


@pytest.mark.clause("MD-HFQ-4")
def test_the_two_conventions_of_zero_points_differ_by_one_step(make_quantized: Callable[[str], Any]) -> None:
    """D-53: the same integers under "gptq" and under "gptq_v2"."""
    directory = make_quantized("gptq 4")
    with open_checkpoint(directory.write()) as first:
        one = first.read(f"{Q}.weight")
    with open_checkpoint(directory.write(checkpoint_format="gptq_v2")) as second:
        two = second.read(f"{Q}.weight")
    scales = directory.tensors[f"{Q}.scales"].float().numpy()
    assert np.array_equal(two - one, np.repeat(scales, 32, axis=0).T)


@pytest.mark.clause("MD-HFQ-8")
def test_a_bias_of_zeros_that_the_model_has_no_place_for_is_left_out(make_quantized: Callable[[str], Any]) -> None:
    directory = make_quantized("gptq 4")
    directory.tensors[f"{Q}.bias"] = torch.zeros(64, dtype=torch.float16)
    with open_checkpoint(directory.write()) as checkpoint:
        assert f"{Q}.bias" not in checkpoint.tensors
    directory.tensors[f"{Q}.bias"][3] = 1
    with pytest.raises(InvalidFormatError, match=r"q_proj\.bias"):
        open_checkpoint(directory.write())


def remove(ending: str) -> Callable[[Any], None]:
    return lambda directory: directory.tensors.pop(f"{Q}.{ending}")


def replace(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def apply(directory: Any) -> None:
        directory.tensors[f"{Q}.{ending}"] = change(directory.tensors[f"{Q}.{ending}"])

    return apply


def put(ending: str, tensor: torch.Tensor) -> Callable[[Any], None]:
    return lambda directory: directory.tensors.__setitem__(f"{Q}.{ending}", tensor)


def spoil(ending: str, value: float) -> Callable[[Any], None]:
    def apply(directory: Any) -> None:
        flat = directory.tensors[f"{Q}.{ending}"].view(-1)
        flat[-1] = value

    return apply


BAD: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "no scales": (
        "gptq 4",
        remove("scales"),
        r"q_proj\.scales: got nothing, expected shape \[2, 64\] beside .*qweight \[8, 64\]",
    ),
    "no zeros": ("awq", remove("qzeros"), r"q_proj\.qzeros: got nothing, expected shape \[2, 8\] beside .*\[64, 8\]"),
    "no words": ("awq", remove("qweight"), r"q_proj\.qweight: got nothing, expected a matrix beside"),
    "no order": ("gptq 3 act-order", remove("g_idx"), r"q_proj\.g_idx: got nothing, expected shape \[64\] beside"),
    "no fp8 scale": (
        "fp8 blocks",
        remove("weight_scale_inv"),
        r"q_proj\.weight_scale_inv: got nothing, expected shape \[2, 2\] beside .*weight \[64, 64\]",
    ),
    "no packed weight": ("int4 packed", remove("weight_packed"), r"q_proj\.weight_packed: got nothing"),
    "no int8 scale": ("int8", remove("weight_scale"), r"q_proj\.weight_scale: got nothing, expected shape \[64, 1\]"),
    "scales of another group": (
        "gptq 4",
        replace("scales", lambda t: t[:1].clone()),
        r"q_proj\.scales: got shape \[1, 64\], expected \[2, 64\] beside .*qweight \[8, 64\]",
    ),
    "fewer zeros": (
        "awq",
        replace("qzeros", lambda t: t[:, 1:].clone()),
        r"q_proj\.qzeros: got shape \[2, 7\], expected \[2, 8\] beside .*qweight \[64, 8\]",
    ),
    "another matrix": (
        "gptq 4",
        replace("qweight", lambda t: t[:4].clone()),
        r"q_proj\.qzeros: got shape \[2, 8\], expected \[1, 8\] beside .*qweight \[4, 64\]",
    ),
    "short order": (
        "gptq 3 act-order",
        replace("g_idx", lambda t: t[1:].clone()),
        r"q_proj\.g_idx: got shape \[63\], expected \[64\] beside .*qweight \[6, 64\]",
    ),
    "order beyond": (
        "gptq 3 act-order",
        spoil("g_idx", 4),
        r"q_proj\.g_idx: got .* 0 to 4, expected 0 to 3.*scales \[4, 64\]",
    ),
    "fp8 scales": (
        "fp8 blocks",
        replace("weight_scale_inv", lambda t: t[:1].clone()),
        r"q_proj\.weight_scale_inv: got shape \[1, 2\], expected \[2, 2\] beside .*weight \[64, 64\]",
    ),
    "fp8 tensor scale": (
        "fp8 tensor",
        put("weight_scale", torch.ones(5)),
        r"q_proj\.weight_scale: got shape \[5\], expected \[1\], \[64, 1\] or blocks of weight \[64, 64\]",
    ),
    "shape that lies": (
        "int4 packed",
        put("weight_shape", torch.tensor([64, 40])),
        r"q_proj\.weight_shape: got \[64, 40\], expected \[64, 64\] beside weight_packed \[64, 8\]",
    ),
    "rows that lie": (
        "int4 packed",
        put("weight_shape", torch.tensor([32, 64])),
        r"q_proj\.weight_shape: got \[32, 64\], expected \[64, 64\] beside weight_packed \[64, 8\]",
    ),
    "dtype of words": (
        "gptq 4",
        replace("qweight", lambda t: t.float()),
        r"q_proj\.qweight: got dtype F32\[8, 64\], expected one of I32, U32",
    ),
    "not a number": (
        "gptq 4",
        spoil("scales", float("nan")),
        r"q_proj\.scales: got 1 scales that are NaN or infinite, the first at \[1, 63\], expected finite",
    ),
    "infinite": ("awq", spoil("scales", float("inf")), r"q_proj\.scales: got 1 scales that are NaN or infinite"),
    "fp8 not a number": ("fp8 tensor", spoil("weight_scale", float("nan")), r"weight_scale: got 1 scales that are NaN"),
    "both forms": (
        "int4 packed",
        put("weight", torch.ones(3)),
        r"q_proj\.weight: got shape \[3\] beside weight_packed \[64, 8\], .*, expected no such tensor",
    ),
    "an extra tensor": ("gptq 4", put("qbias", torch.ones(3)), r"1 tensors that .* no place for .*q_proj\.qbias"),
    "an extra matrix": (
        "gptq 4",
        lambda d: d.tensors.update({n.replace("layers.0", "layers.7"): t.clone() for n, t in list(d.tensors.items())}),
        r"9 tensors that .* no place for .*layers\.7",
    ),
    "a whole matrix missing": (
        "awq",
        lambda d: [d.tensors.pop(f"{Q}.{ending}") for ending in ("qweight", "qzeros", "scales")] and None,
        r"q_proj\.weight: got nothing, expected shape \[64, 64\]",
    ),
    "a matrix of another size": (
        "fp8 tensor",
        replace("weight", lambda t: t[:32].clone()),
        r"q_proj\.weight: got shape \[32, 64\], expected \[64, 64\]",
    ),
}


@pytest.mark.clause("MD-HFQ-4", "MD-HFQ-5", "MD-HFQ-6", "MD-HFQ-7", "MD-HFQ-8")
@pytest.mark.parametrize("name", BAD)
def test_each_bad_checkpoint_is_one_error_with_the_tensor_and_both_shapes(
    name: str, make_quantized: Callable[[str], Any]
) -> None:
    kind, damage, message = BAD[name]
    directory = make_quantized(kind)
    damage(directory)
    with pytest.raises(InvalidFormatError, match=message) as caught:
        open_checkpoint(directory.write())
    assert "\n" not in str(caught.value)


SETTINGS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "method": ("gptq 4", {"quant_method": "bitsandbytes"}, UnsupportedError, "quant_method: got 'bitsandbytes'"),
    "bits": ("gptq 4", {"bits": 9}, InvalidFormatError, "bits: got 9, expected 2 to 8"),
    "no bits": ("gptq 4", {"bits": None}, InvalidFormatError, "bits: got None, expected an integer"),
    "wrong bits": (
        "gptq 4",
        {"bits": 8},
        InvalidFormatError,
        r"\.qzeros: got shape \[3, 8\], expected \[2, 16\] beside",
    ),
    "odd bits": ("gptq 4", {"bits": 3}, InvalidFormatError, r"\.qzeros: got shape \[3, 8\], expected \[4, 6\] beside"),
    "bits that fill no words": (
        "gptq 4",
        {"bits": 7},
        InvalidFormatError,
        r"down_proj\.qweight: got shape \[12, 64\], expected a multiple of 7 rows for 7 bits",
    ),
    "group": ("gptq 4", {"group_size": 0}, InvalidFormatError, "group_size: got 0, expected -1 or a positive"),
    "group that divides nothing": (
        "awq",
        {"group_size": 40},
        InvalidFormatError,
        r"down_proj\.qweight: got 96 inputs, expected a multiple of the configuration's group_size 40",
    ),
    "another group": ("awq", {"group_size": 96}, InvalidFormatError, r"\.qzeros: got shape \[3, 8\], .*\[1, 8\]"),
    "marlin": ("gptq 4", {"checkpoint_format": "marlin"}, UnsupportedError, "checkpoint_format: got 'marlin'"),
    "dynamic": ("gptq 4", {"dynamic": {"+:x": {"bits": 8}}}, UnsupportedError, "dynamic: got"),
    "awq bits": ("awq", {"bits": 8}, UnsupportedError, "bits: got 8, expected 4"),
    "awq layout": ("awq", {"version": "gemv"}, UnsupportedError, "version: got 'gemv', expected gemm"),
    "awq without zeros": ("awq", {"zero_point": False}, UnsupportedError, "zero_point: got False"),
    "fp8 kind": ("fp8 blocks", {"fmt": "e5m2"}, UnsupportedError, "fmt: got 'e5m2', expected e4m3"),
    "fp8 block": ("fp8 blocks", {"weight_block_size": [32]}, InvalidFormatError, r"weight_block_size: got \[32\]"),
    "fp8 odd block": ("fp8 blocks", {"weight_block_size": [96, 32]}, UnsupportedError, "expected powers of two"),
    "layout": ("int8", {"format": "marlin-24"}, UnsupportedError, "format: got 'marlin-24'"),
    "groups": ("int8", {"config_groups": {}}, InvalidFormatError, "config_groups: got {}"),
    "an array": ("int8", {"config_groups": {"a": []}}, InvalidFormatError, "config_groups"),
}


@pytest.mark.clause("MD-HFQ-1", "MD-HFQ-2")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_make_no_sense_are_named(name: str, make_quantized: Callable[[str], Any]) -> None:
    kind, changes, error, message = SETTINGS[name]
    directory = make_quantized(kind)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(directory.write(**changes))
    assert "\n" not in str(caught.value)
