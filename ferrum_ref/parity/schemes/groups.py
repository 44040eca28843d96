"""Integers by groups of inputs, and FP8 numbers with scales.   Clauses: PA-SCHEME-1, PA-SCHEME-3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ferrum_ref.interfaces.quant_schemes import QuantFp8, QuantGroups, QuantScheme
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.quant_groups import GroupWeights
from ferrum_ref.kernels.quant_matrix import Fp8Matrix, GroupMatrix, QuantMatrix
from ferrum_ref.parity.ops.operation import DRAWN, IID, Case, case
from ferrum_ref.parity.schemes.scheme import EXTREME, NEGATIVE, ONES, Arrays, Scheme
from ferrum_ref.parity.units import Array

FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


class Groups(Scheme):
    """q s, two's complement, or (q - z) s where `zeros`: 8 bits a byte, or 4 bits two to a byte, the low one first."""

    def __init__(self, bits: Literal[4, 8]) -> None:
        self.bits: Literal[4, 8] = bits
        self.name = f"int{bits}"
        self.kinds = (self.name,)

    def cases(self) -> tuple[Case, ...]:
        return (
            case(IID, x=(3, 64), N=5, group=32, zeros=False),
            case(IID, x=(2, 128), N=33, group=64, zeros=True),
            case(IID, x=(2, 3, 96), N=7, group=96, zeros=False),
            case(IID, x=(64,), N=8, group=16, zeros=True),
            case("one-hot rows", x=(32, 64), N=9, group=32, zeros=False),
            case("one-hot rows", x=(32, 64), N=9, group=32, zeros=True),
            case("tail of K", x=(3, 96), N=9, group=32, zeros=True),
            case(EXTREME, x=(3, 64), N=6, group=32, zeros=False),
            case(EXTREME, x=(3, 64), N=6, group=32, zeros=True),
            case(NEGATIVE, x=(3, 64), N=6, group=32, zeros=True),
            case("strided", x=(3, 64), N=6, group=32, zeros=False),
            case("positive", x=(2, 256), N=8, group=64, zeros=True),
            case(ONES, x=(2, 256), N=3, group=64, zeros=False),
            case(DRAWN, number=1),
            case(IID, small=False, x=(2, 2048), N=96, group=128, zeros=True),
        )

    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        with_zeros, top = case.sizes["zeros"], 1 << self.bits
        shape = (num_rows, num_columns // case.sizes["group"])
        codes = rng.integers(0, top, (num_rows, num_columns), dtype=np.uint8)
        zeros = rng.integers(0, top, shape, dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, shape) * max(num_columns, 1) ** -0.5 / (top / 3.0)
        if case.probe == NEGATIVE:
            scales[..., ::2] *= -1.0
        if case.probe == EXTREME:
            ends = np.array([0, top - 1, top // 2, top // 2 - 1], dtype=np.uint8)
            codes, zeros = rng.choice(ends, codes.shape), rng.choice(ends, zeros.shape)
        if case.probe == ONES:
            codes[...], scales[...] = 1, 1.0
        packed = codes if self.bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
        if self.bits == 8 and not with_zeros:
            packed = packed.view(np.int8)
        arrays = {"packed": np.ascontiguousarray(packed), "scales": scales.astype(np.float32)}
        return {**arrays, "zeros": zeros} if with_zeros else arrays

    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        return GroupMatrix(
            GroupWeights(arrays["packed"], arrays["scales"], arrays.get("zeros"), self.bits, sizes["group"])
        )

    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        return {**arrays, "packed": np.zeros_like(arrays["packed"])}

    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        return QuantGroups(self.bits, tensors["scales"], tensors.get("zeros"))


class Fp8(Scheme):
    """f s, s for the tensor, a row, or a block of `block`."""

    name = "fp8"
    kinds = ("fp8",)

    def cases(self) -> tuple[Case, ...]:
        return (
            case(IID, x=(3, 64), N=5, format="e4m3", scaled="tensor"),
            case(IID, x=(2, 128), N=33, format="e4m3", scaled="rows"),
            case(IID, x=(2, 128), N=64, format="e4m3", scaled="blocks"),
            case(IID, x=(2, 3, 96), N=7, format="e5m2", scaled="rows"),
            case(IID, x=(96,), N=40, format="e5m2", scaled="blocks"),
            case("one-hot rows", x=(32, 64), N=40, format="e4m3", scaled="blocks"),
            case("one-hot rows", x=(32, 64), N=9, format="e5m2", scaled="tensor"),
            case("tail of K", x=(3, 96), N=9, format="e4m3", scaled="rows"),
            case(EXTREME, x=(3, 64), N=6, format="e4m3", scaled="rows"),
            case("strided", x=(3, 64), N=6, format="e4m3", scaled="rows"),
            case("positive", x=(2, 256), N=8, format="e4m3", scaled="rows"),
            case(ONES, x=(2, 256), N=3, format="e4m3", scaled="tensor"),
            case(DRAWN, number=1),
            case(IID, small=False, x=(2, 2048), N=96, format="e4m3", scaled="blocks"),
        )

    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        element = FP8[case.sizes["format"]]
        numbers = (16.0 * rng.standard_normal((num_rows, num_columns))).astype(element)
        shape = {"tensor": (), "rows": (num_rows,), "blocks": (-(-num_rows // 32), -(-num_columns // 32))}
        scale = rng.uniform(0.5, 1.5, shape[case.sizes["scaled"]]) * max(num_columns, 1) ** -0.5 / 16.0
        if case.probe == EXTREME:  # the least subnormal, the least normal, the largest
            ends = np.array([0x01, 0x08, 0x7E, 0x81, 0x88, 0xFE], dtype=np.uint8)
            numbers = rng.choice(ends, numbers.shape).view(element)
        if case.probe == ONES:
            numbers, scale = np.ones(numbers.shape).astype(element), np.ones_like(scale)
        return {"packed": numbers.view(np.uint8), "scale": np.asarray(scale, dtype=np.float32)}

    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        return Fp8Matrix(arrays["packed"], arrays["scale"], sizes["format"])

    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        return {**arrays, "packed": np.zeros_like(arrays["packed"])}

    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        return QuantFp8(sizes["format"], tensors["scale"])
