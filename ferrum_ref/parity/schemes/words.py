"""Integers in 32-bit words: GPTQ's and AWQ's tensors.   Clauses: PA-SCHEME-1, PA-SCHEME-3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ferrum_ref.interfaces.quant_schemes import QuantAwq, QuantGptq, QuantScheme
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.quant_awq import AwqWeights, pack_awq
from ferrum_ref.kernels.quant_gptq import GptqWeights
from ferrum_ref.kernels.quant_matrix import AwqMatrix, GptqMatrix, QuantMatrix
from ferrum_ref.kernels.quant_words import pack_words
from ferrum_ref.parity.ops.operation import DRAWN, IID, Case, case
from ferrum_ref.parity.schemes.scheme import EXTREME, NEGATIVE, ONES, Arrays, Scheme
from ferrum_ref.parity.units import Array


class Gptq(Scheme):
    """(q - (z + 1)) s in version 1, (q - z) s in version 2; act-order where `ordered`."""

    name = "gptq"
    kinds = ("gptq",)
    step_out = 32

    def cases(self) -> tuple[Case, ...]:
        plain: dict[str, Any] = {"bits": 4, "group": 32, "version": 1, "ordered": False}
        return (
            case(IID, x=(3, 64), N=32, **plain),
            case(IID, x=(2, 128), N=64, **{**plain, "group": 64, "version": 2}),
            case(IID, x=(2, 96), N=32, **{**plain, "ordered": True}),
            case(IID, x=(2, 3, 64), N=32, **{**plain, "group": -1}),
            case(IID, x=(2, 64), N=32, **{**plain, "bits": 8}),
            case(IID, x=(2, 64), N=32, **{**plain, "bits": 2, "ordered": True}),
            case(IID, x=(2, 64), N=32, **{**plain, "bits": 3}),
            case(IID, x=(64,), N=40, **plain),
            case("one-hot rows", x=(32, 64), N=32, **plain),
            case("one-hot rows", x=(32, 64), N=32, **{**plain, "ordered": True, "version": 2}),
            case("tail of K", x=(3, 96), N=32, **plain),
            case(EXTREME, x=(3, 64), N=32, **plain),
            case(NEGATIVE, x=(3, 64), N=32, **plain),
            case("strided", x=(3, 64), N=32, **plain),
            case("positive", x=(2, 256), N=32, **plain),
            case(ONES, x=(2, 256), N=32, **{**plain, "group": 64}),
            case(DRAWN, number=1),
            case(IID, small=False, x=(2, 2048), N=128, **{**plain, "group": 128}),
        )

    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        bits, group = case.sizes["bits"], case.sizes["group"]
        size = num_columns if group == -1 else group
        num_groups, top = -(-num_columns // size), 1 << bits
        codes = rng.integers(0, top, (num_columns, num_rows), dtype=np.uint8)
        zeros = rng.integers(0, top, (num_groups, num_rows), dtype=np.uint8)
        scales = _scales(case, (num_groups, num_rows), num_columns, top, rng)
        if case.probe == EXTREME:
            codes, zeros = (rng.choice(np.array([0, top - 1], np.uint8), part.shape) for part in (codes, zeros))
        if case.probe == ONES:
            codes[...], zeros[...] = 2, 1 if case.sizes["version"] == 2 else 0
        arrays = {"packed": pack_words(codes, bits, 0), "qzeros": pack_words(zeros, bits, 1), "scales": scales}
        if case.sizes["ordered"]:
            arrays["g_idx"] = rng.permutation(np.arange(num_columns) // size).astype(np.int32)
        return arrays

    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        version = "gptq" if sizes["version"] == 1 else "gptq_v2"
        return GptqMatrix(
            GptqWeights(
                arrays["packed"],
                arrays["qzeros"],
                arrays["scales"],
                arrays.get("g_idx"),
                sizes["bits"],
                sizes["group"],
                version,  # type: ignore[arg-type]
            )
        )

    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        return {**arrays, "packed": np.zeros_like(arrays["packed"])}

    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        version = "gptq" if sizes["version"] == 1 else "gptq_v2"
        qzeros, scales, order = tensors["qzeros"], tensors["scales"], tensors.get("g_idx")
        return QuantGptq(sizes["bits"], sizes["group"], version, qzeros, scales, order)  # type: ignore[arg-type]


class Awq(Scheme):
    """(q - z) s, the nibbles of a word in AWQ's order of outputs."""

    name = "awq"
    kinds = ("awq",)
    step_out = 8

    def cases(self) -> tuple[Case, ...]:
        return (
            case(IID, x=(3, 64), N=16, group=32),
            case(IID, x=(2, 128), N=64, group=64),
            case(IID, x=(2, 3, 64), N=24, group=-1),
            case(IID, x=(64,), N=8, group=32),
            case("one-hot rows", x=(32, 64), N=16, group=32),
            case("tail of K", x=(3, 96), N=16, group=32),
            case(EXTREME, x=(3, 64), N=16, group=32),
            case(NEGATIVE, x=(3, 64), N=16, group=32),
            case("strided", x=(3, 64), N=16, group=32),
            case("positive", x=(2, 256), N=8, group=32),
            case(ONES, x=(2, 256), N=8, group=64),
            case(DRAWN, number=1),
            case(IID, small=False, x=(2, 2048), N=128, group=128),
        )

    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        size = num_columns if case.sizes["group"] == -1 else case.sizes["group"]
        codes = rng.integers(0, 16, (num_columns, num_rows), dtype=np.uint8)
        zeros = rng.integers(0, 16, (num_columns // size, num_rows), dtype=np.uint8)
        scales = _scales(case, zeros.shape, num_columns, 16, rng)
        if case.probe == EXTREME:
            codes, zeros = (rng.choice(np.array([0, 15], np.uint8), part.shape) for part in (codes, zeros))
        if case.probe == ONES:
            codes[...], zeros[...] = 2, 1
        return {"packed": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}

    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        return AwqMatrix(AwqWeights(arrays["packed"], arrays["qzeros"], arrays["scales"], sizes["group"]))

    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        return {**arrays, "packed": np.zeros_like(arrays["packed"])}

    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        return QuantAwq(sizes["group"], tensors["qzeros"], tensors["scales"])


def _scales(case: Case, shape: tuple[int, ...], num_columns: int, top: int, rng: np.random.Generator) -> Array:
    """float16 scales that make weights of about K^-1/2."""
    scales = rng.uniform(0.5, 1.5, shape) * max(num_columns, 1) ** -0.5 / (top / 3.0)
    if case.probe == NEGATIVE:
        scales[..., ::2] *= -1.0
    if case.probe == ONES:
        scales[...] = 1.0
    return np.asarray(scales.astype(np.float16))
