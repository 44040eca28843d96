"""Rows of whole blocks in a named format: ggml's, and plain numbers.   Clauses: PA-SCHEME-1..2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from ferrum_ref.interfaces.quant_schemes import QuantRows, QuantScheme
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.quant import quant_format
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.parity.ops.operation import DRAWN, IID, Case, case
from ferrum_ref.parity.schemes.scheme import EXTREME, NEGATIVE, ONES, SUBNORMAL, Arrays, Scheme
from ferrum_ref.parity.units import Array

Bytes = tuple[int, int, int]  # from, to, value


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """scale, offset: where the float16s stand (-1: no offset); spread: the size of what the scale multiplies; floor:
    of what the offset does; codes: the bytes of the codes; ones: the bytes that make every weight 1 when the scale is 1
    and the offset 0."""

    scale: int
    offset: int
    spread: float
    floor: float
    codes: tuple[tuple[int, int], ...]
    ones: tuple[Bytes, ...]


class BlockRows(Scheme):
    """d (q - z), d q + m, or the K-quants' d sc q - dmin mn."""

    def __init__(self, format_name: str, layout: BlockLayout, roundings: int) -> None:
        self.format, self.layout, self.roundings = format_name, layout, roundings
        self.name = format_name.lower()
        self.kinds = (self.name,)
        self.step_in = quant_format(format_name).block_elements

    def cases(self) -> tuple[Case, ...]:
        step = self.step_in
        wide = max(2 * step, 128)
        return (
            case(IID, x=(3, step), N=5),
            case(IID, x=(2, wide), N=33),
            case("tail of K", x=(3, wide), N=9),
            case("one-hot rows", x=(32, step), N=9),
            case(IID, x=(1, step), N=1),
            case(IID, x=(2, 3, wide), N=7),
            case(IID, x=(step,), N=12),
            case(SUBNORMAL, x=(2, step), N=8),
            case(NEGATIVE, x=(2, wide), N=8),
            case("one live block", x=(2, wide), N=8),
            case(EXTREME, x=(3, step), N=6),
            case("positive", x=(2, wide), N=8),
            case("strided", x=(3, step), N=6),
            case(IID, x=(0, step), N=8),
            case(ONES, x=(2, 256), N=3),
            case(DRAWN, number=1),
            case(IID, small=False, x=(2, 2304), N=96),
        )

    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        form, layout = quant_format(self.format), self.layout
        shape = (num_rows, num_columns // form.block_elements)
        blocks = rng.integers(0, 256, (*shape, form.block_bytes), dtype=np.uint8)
        gain = max(num_columns, 1) ** -0.5
        scale = rng.uniform(0.5, 1.5, shape) * gain / layout.spread
        offset = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape) * gain / max(layout.floor, 1e-3)
        if case.probe == SUBNORMAL:
            scale, offset = (rng.integers(1, 1024, shape) * 2.0**-24 for _ in range(2))
        if case.probe == NEGATIVE:
            scale[..., ::2] *= -1.0
        if case.probe == "one live block":
            scale[:, :-1], offset[:, :-1] = 0.0, 0.0
        if case.probe == EXTREME:
            blocks[...] = rng.choice(np.array([0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F], dtype=np.uint8), blocks.shape)
        if case.probe == ONES:
            scale, offset = np.ones(shape), np.zeros(shape)
            for start, stop, value in layout.ones:
                blocks[..., start:stop] = value
        for place, values in ((layout.scale, scale), (layout.offset, offset)):
            if place >= 0:
                halves = np.ascontiguousarray(values.astype(np.float16)).view(np.uint8).reshape(*shape, 2)
                blocks[..., place : place + 2] = halves
        return {"packed": blocks.reshape(num_rows, shape[1] * form.block_bytes)}

    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        return RowMatrix(np.ascontiguousarray(arrays["packed"]), self.format)

    def blocks(self, arrays: Arrays) -> Array:
        """A copy of the packed bytes, (N, blocks, bytes of a block). Pure."""
        packed, size = arrays["packed"], quant_format(self.format).block_bytes
        return packed.reshape(packed.shape[0], packed.shape[1] // size, size).copy()

    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        blocks = self.blocks(arrays)
        for start, stop in self.layout.codes:
            blocks[..., start:stop] = 0
        return {**arrays, "packed": blocks.reshape(arrays["packed"].shape)}

    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        return QuantRows(self.format)


class PlainRows(Scheme):
    """Rows of numbers: nothing to unpack but the bytes."""

    name = "plain"
    kinds = ("f32", "f16", "bf16", "f64", "f8_e4m3", "f8_e5m2")
    step_in = 1
    roundings = 2  # a float64 is rounded to float32 first
    elements: ClassVar[Mapping[str, Any]] = {
        "f32": np.float32,
        "f16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "f64": np.float64,
        "f8_e4m3": ml_dtypes.float8_e4m3fn,
        "f8_e5m2": ml_dtypes.float8_e5m2,
    }

    def cases(self) -> tuple[Case, ...]:
        found = []
        for number, kind in enumerate(self.kinds):
            found += [case(IID, x=(3, 65 + number), N=7, kind=kind), case("one-hot rows", x=(8, 24), N=5, kind=kind)]
            found += [case("strided", x=(2, 40), N=6, kind=kind), case(ONES, x=(2, 256), N=3, kind=kind)]
        return (*found, case("tail of K", x=(2, 129), N=9, kind="bf16"), case("positive", x=(2, 200), N=8, kind="f16"))

    def kind_of(self, sizes: Mapping[str, Any]) -> str:
        return str(sizes["kind"])

    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        values = rng.standard_normal((num_rows, num_columns)) * max(num_columns, 1) ** -0.5
        if case.probe == ONES:
            values[...] = 1.0
        return {"packed": np.ascontiguousarray(values.astype(self.elements[case.sizes["kind"]])).view(np.uint8)}

    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        return RowMatrix(np.ascontiguousarray(arrays["packed"]), str(sizes["kind"]).upper())

    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        return {**arrays, "packed": np.zeros_like(arrays["packed"])}

    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        return QuantRows(str(sizes["kind"]).upper())


BLOCKS: tuple[BlockRows, ...] = (
    BlockRows("Q4_1", BlockLayout(0, 2, 8.0, 1.0, ((4, 20),), ((4, 20, 0x11),)), 3),
    BlockRows("Q5_0", BlockLayout(0, -1, 9.0, 1.0, ((2, 22),), ((2, 6, 0xFF), (6, 22, 0x11))), 2),
    BlockRows("Q5_1", BlockLayout(0, 2, 16.0, 1.0, ((4, 24),), ((4, 8, 0x00), (8, 24, 0x11))), 3),
    BlockRows("Q2_K", BlockLayout(80, 82, 12.0, 8.0, ((16, 80),), ((0, 16, 0x01), (16, 80, 0x55))), 3),
    BlockRows(
        "Q3_K",
        BlockLayout(108, -1, 40.0, 1.0, ((0, 96),), ((0, 32, 0xFF), (32, 96, 0x55), (96, 104, 0x11), (104, 108, 0xAA))),
        3,
    ),
    BlockRows(
        "Q4_K",
        BlockLayout(0, 2, 240.0, 32.0, ((16, 144),), ((4, 8, 0x01), (8, 12, 0x00), (12, 16, 0x01), (16, 144, 0x11))),
        3,
    ),
    BlockRows(
        "Q5_K",
        BlockLayout(
            0,
            2,
            480.0,
            32.0,
            ((16, 176),),
            ((4, 8, 0x01), (8, 12, 0x00), (12, 16, 0x01), (16, 48, 0x00), (48, 176, 0x11)),
        ),
        3,
    ),
    BlockRows(
        "Q6_K",
        BlockLayout(208, -1, 1300.0, 1.0, ((0, 192),), ((0, 128, 0x11), (128, 192, 0xAA), (192, 208, 0x01))),
        3,
    ),
)
