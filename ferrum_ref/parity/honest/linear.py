"""Projections, plain and packed, and matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ferrum_ref.kernels.quant import decode
from ferrum_ref.parity.honest.sums import F32, Dot, Kernel, dot_lanes, dot_sequential, stored, wide
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}
ORDERS: Mapping[str, Dot] = MappingProxyType({"sequential": dot_sequential, "16 partial sums": dot_lanes})


def linear(dot: Dot) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, weight = wide(inputs, "x", "weight")
        return stored(inputs, projected(x, weight, dot))

    return run


def projected(x: Array, weight: Array, dot: Dot) -> Array:
    """x (..., K) @ weight (N, K).T in float32."""
    rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    return dot(rows, weight.T).reshape(*x.shape[:-1], weight.shape[0])


def matmul(dot: Dot) -> Kernel:
    return lambda inputs: stored(inputs, dot(*wide(inputs, "a", "b")))


def batch_matmul(dot: Dot) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        count = len(inputs.arrays) // 2
        return stored(inputs, *(dot(*wide(inputs, f"a{index}", f"b{index}")) for index in range(count)))

    return run


def parts_of(packed: Array, packed_format: str) -> tuple[Array, Array]:
    """Scales (N, blocks) in float32 and whole-number codes (N, blocks, 32), the zero point not yet taken off."""
    size = BLOCK_BYTES[packed_format]
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // size, size)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(F32)
    codes = np.ascontiguousarray(blocks[..., 2:])
    if packed_format == "Q8_0":
        return scales, codes.view(np.int8).astype(F32)
    return scales, np.concatenate([codes & 0x0F, codes >> 4], axis=-1).astype(F32)


def quantized_linear(packed_format: str, form: str) -> Kernel:
    """form: unpacked, sequential, 16 partial sums, by blocks, or scale last (one product with d a block)."""
    zero = F32(8.0) if packed_format == "Q4_0" else F32(0.0)

    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        packed = inputs.arrays["packed"]
        if form == "unpacked":
            weight = np.asarray(decode(packed_format, np.ascontiguousarray(packed)))
            return stored(inputs, projected(x, weight, np.matmul))
        scales, codes = parts_of(packed, packed_format)
        if form in ORDERS:
            weight = scales[..., None] * (codes - zero)
            return stored(inputs, projected(x, weight.reshape(packed.shape[0], x.shape[-1]), ORDERS[form]))
        rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1] // BLOCK, BLOCK)
        total: Array = np.zeros((rows.shape[0], packed.shape[0]), dtype=F32)
        for block in range(rows.shape[1]):
            quanta = codes[:, block] - zero
            if form == "scale last":
                total = total + scales[:, block] * (rows[:, block] @ quanta.T)
            else:
                total = total + rows[:, block] @ (scales[:, block, None] * quanta).T
        return stored(inputs, total.reshape(*x.shape[:-1], packed.shape[0]))

    return run
