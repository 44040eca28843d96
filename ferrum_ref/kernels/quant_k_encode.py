"""Encoding to Q4_K and Q6_K so that no element is further than half a step from its decoded value.

The scales are chosen from the outside in and always rounded up, first to the block's integer, then to float16, so that
the rounded grid still covers every element: nothing is clipped, and the error is at most half of the *stored* step.
(ggml searches for scales of a smaller mean square; its files and these decode by the same rule.)

Clauses: QT-K-2..3 (specs/quant.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.kernels.quant_k import half

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def encode_q4_k(values: Float32) -> Bytes:
    """(n, 256) finite float32 -> (n, 144) uint8.  [QT-K-2]

    Block minimum M = dmin * mn >= max(0, -min x); step d * sc >= (max(x) + M) / 15.5; q = rint((x + M) / step).  Pure.
    Raises InvalidParameterError where d or dmin would pass 65504.
    """
    blocks = values.reshape(len(values), 8, 32).astype(np.float64)
    dmin, minima = _integer_scales("Q4_K", np.maximum(-blocks.min(axis=-1), 0), 63)
    floor = (_as_float32(dmin) * minima.astype(np.float32)).astype(np.float64)
    d, scales = _integer_scales("Q4_K", (blocks.max(axis=-1) + floor) / 15.5, 63)
    step = (_as_float32(d) * scales.astype(np.float32)).astype(np.float64)
    quanta = np.rint(_divide(blocks + floor[..., None], step[..., None])).clip(0, 15).astype(np.uint8)
    pairs = quanta.reshape(len(values), 4, 2, 32)
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << np.uint8(4))).reshape(len(values), 128)
    return np.concatenate([d, dmin, _join_six_bit_pairs(scales, minima), nibbles], axis=-1)


def encode_q6_k(values: Float32) -> Bytes:
    """(n, 256) finite float32 -> (n, 210) uint8.  [QT-K-2]

    The side of zero with the larger magnitude gets the 32 negative levels (the sign is the scale's); step = d * |sc|
    >= max(larger / 32.5, smaller / 31.5); q = rint(x / step) + 32.  Pure.
    Raises InvalidParameterError where d would pass 65504.
    """
    blocks = values.reshape(len(values), 16, 16).astype(np.float64)
    above, below = np.maximum(blocks.max(axis=-1), 0), np.maximum(-blocks.min(axis=-1), 0)
    need = np.maximum(np.maximum(above, below) / 32.5, np.minimum(above, below) / 31.5)
    d, magnitudes = _integer_scales("Q6_K", need, 127)
    scales = np.where(above > below, -magnitudes.astype(np.int16), magnitudes).astype(np.int8)
    step = (_as_float32(d) * scales.astype(np.float32)).astype(np.float64)
    quanta = (np.rint(_divide(blocks, step[..., None])).clip(-32, 31) + 32).astype(np.uint8)
    nibbles = (quanta & np.uint8(15)).reshape(len(values), 2, 2, 64)
    pairs = (quanta >> np.uint8(4)).reshape(len(values), 2, 4, 32)
    low = (nibbles[:, :, 0] | (nibbles[:, :, 1] << np.uint8(4))).reshape(len(values), 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    top = np.bitwise_or.reduce(pairs << shifts, axis=2).reshape(len(values), 64)
    return np.concatenate([low, top, scales.view(np.uint8), d], axis=-1)


def _integer_scales(name: str, need: Float64, largest: int) -> tuple[Bytes, Bytes]:
    """A float16 d (n, 2 bytes) and integers s (n, blocks) in [0, largest] with float32(d * s) >= need everywhere."""
    wanted = need.max(axis=-1, keepdims=True) / largest
    with np.errstate(over="ignore"):
        d = wanted.astype("<f2")
    d = np.where(d.astype(np.float64) < wanted, np.nextafter(d, np.float16(np.inf)), d).astype("<f2")
    if not np.isfinite(d).all():
        raise InvalidParameterError(
            f"encode {name}: values: got a scale of {wanted.max():g}, expected at most 65504 in float16"
        )
    integers = np.ceil(_divide(need, d.astype(np.float64))).clip(0, largest).astype(np.uint8)
    return d.view(np.uint8).reshape(len(need), 2), integers


def _as_float32(d: Bytes) -> Float32:
    return half(d, 0)


def _divide(values: Float64, step: Float64) -> Float64:
    """values / step, and 0 where the step is 0: such a block holds zeros only."""
    return np.divide(values, step, out=np.zeros_like(values), where=np.broadcast_to(step != 0, values.shape))


def _join_six_bit_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    four, six = np.uint8(4), np.uint8(6)
    first = scales[:, :4] | ((scales[:, 4:] >> four) << six)
    second = minima[:, :4] | ((minima[:, 4:] >> four) << six)
    third = (scales[:, 4:] & np.uint8(15)) | ((minima[:, 4:] & np.uint8(15)) << four)
    return np.concatenate([first, second, third], axis=-1)
