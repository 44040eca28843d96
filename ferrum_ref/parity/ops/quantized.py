"""Projections by weights that stay packed in ggml's blocks of 32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.quantized import BLOCK, quantized_linear_error
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.linear import LOST_TERM
from ferrum_ref.parity.ops.operation import (
    DRAWN,
    IID,
    Case,
    Expected,
    Inputs,
    Operation,
    axes_of,
    bounded,
    case,
    models_of,
)
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm


class _QuantizedLinear(Operation):
    """x (..., K), packed (N, K / 32 blocks). The scales are what a probe changes."""

    packed_format: ClassVar[str]
    block_bytes: ClassVar[int]
    zero: ClassVar[float]
    cases = (
        case(IID, x=(3, 32), N=5),
        case(IID, x=(2, 128), N=33),
        case("tail of K", x=(3, 96), N=9),
        case("one-hot rows", x=(32, 64), N=17),
        case(IID, x=(1, 64), N=1),
        case(IID, x=(2, 3, 160), N=7),
        case(IID, x=(96,), N=12),
        case("subnormal scales", x=(2, 64), N=8),
        case("negative scales", x=(2, 64), N=8),
        case("one live block", x=(2, 128), N=8),
        case("extreme codes", x=(3, 64), N=6),
        case("positive", x=(2, 256), N=8),
        case("strided", x=(3, 64), N=6),
        case(IID, x=(0, 64), N=8),
        case(IID, x=(2, 32), N=0),
        case(IID, small=False, x=(5, 576), N=192),
        case(IID, small=False, x=(1, 4096), N=64),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case("lost terms", x=(2, 256), N=3),
        case(IID, x=(2, 64), N=130),
        case(IID, x=(17, 64), N=9),
    )

    @property
    def algorithm_name(self) -> str:
        return "quantized_linear"

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"x": (draws.size(rng, 9), BLOCK * draws.size(rng, 12)), "N": draws.size(rng, 70)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        shape, num_rows = case.sizes["x"], case.sizes["N"]
        num_blocks = shape[-1] // BLOCK
        x = rng.standard_normal(shape)
        scales = rng.uniform(0.5, 1.5, (num_rows, num_blocks)) * max(shape[-1], 1) ** -0.5 / 8.0
        codes = rng.integers(0, 256, (num_rows, num_blocks, self.block_bytes - 2), dtype=np.uint8)
        if case.probe == "tail of K":
            x[..., :-1] *= 0.01
            x[..., -1] = 8.0
        if case.probe == "one-hot rows":  # each output is one weight: the order of nibbles, the zero point, the scale
            x = np.eye(shape[-1])[rng.permutation(shape[-1])[: shape[0]]]
        if case.probe == "subnormal scales":
            scales = rng.integers(1, 1024, scales.shape) * 2.0**-24
            x *= 2.0**10
        if case.probe == "negative scales":
            scales[..., ::2] *= -1.0
        if case.probe == "one live block":
            scales[:, np.arange(num_blocks) != num_blocks - 1] = 0.0
        if case.probe == "extreme codes":
            codes[...] = rng.choice(np.array([0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F], dtype=np.uint8), codes.shape)
        if case.probe == "lost terms":  # every weight is 1, every input but the first just below half a unit of it
            x = np.full(shape, LOST_TERM)
            x[..., 0] = 1.0
            scales[...] = 1.0
            codes[...] = 0x99 if self.zero else 0x01
        if case.probe == "positive":
            x = np.abs(x)
        half = np.ascontiguousarray(scales.astype(np.float16)).view(np.uint8).reshape(num_rows, num_blocks, 2)
        packed = np.concatenate([half, codes], axis=-1).reshape(num_rows, num_blocks * self.block_bytes)
        stored = storage.round(x)
        arrays = {"x": draws.strided(stored) if case.probe == "strided" else stored, "packed": packed}
        return Inputs(case, storage, arrays)

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, packed = bridge.tensor(backend, inputs, "x"), bridge.tensor(backend, inputs, "packed")
        scheme = QuantScheme.Q4_0(BLOCK) if self.packed_format == "Q4_0" else QuantScheme.Q8_0(BLOCK)
        return bridge.host(bridge.linear_ops(backend).quantized_linear(x, packed, scheme))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, packed = inputs.exact("x"), inputs.arrays["packed"]
        weight = oracle.unpacked(self.packed_format, packed)
        rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        flat = oracle.linear(rows, weight)
        blocks = packed.reshape(packed.shape[0], packed.shape[1] // self.block_bytes, self.block_bytes)
        halves = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        scales = np.abs(halves.astype(np.float64))
        models = models_of(inputs, algorithm, flat.size)
        value = flat.reshape(*x.shape[:-1], weight.shape[0])
        errors = [
            quantized_linear_error(model, rows, weight, scales, self.zero, flat).reshape(value.shape)
            for model in models
        ]
        return [bounded("y", value, axes_of(value.ndim, "row", "column"), models, errors)]


class QuantizedLinearQ4(_QuantizedLinear):
    """d (q - 8): 16 bytes a block, low nibbles first half, high nibbles second half."""

    name = "quantized_linear_q4_0"
    packed_format, block_bytes, zero = "Q4_0", 18, 8.0


class QuantizedLinearQ8(_QuantizedLinear):
    """d q: 32 signed bytes a block."""

    name = "quantized_linear_q8_0"
    packed_format, block_bytes, zero = "Q8_0", 34, 0.0
