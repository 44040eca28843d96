"""ggml's K-quants: super-blocks of 256 elements whose block scales are themselves quantised.

    Q2_K   16 blocks of 16   value = (d * sc) * q - dmin * mn           sc, mn 4 bits; q 2 bits
    Q3_K   16 blocks of 16   value = (d * (sc - 32)) * (q - 4)          sc 6 bits; q 3 bits
    Q4_K    8 blocks of 32   value = (d * sc) * q - dmin * mn           sc, mn 6 bits; q 4 bits
    Q5_K    8 blocks of 32   value = (d * sc) * q - dmin * mn           sc, mn 6 bits; q 5 bits
    Q6_K   16 blocks of 16   value = (d * sc) * (q - 32)                sc int8;       q 6 bits

Products are formed in this order in float32, one rounding each, so decoding equals ggml's bit for bit.
Source: ggml-common.h (the layouts), ggml-quants.c (dequantize_row_q*_K).  Clauses: QT-K-1..3 (specs/quant.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


def half(blocks: Bytes, start: int) -> Float32:
    """The float16 at byte `start` of each block, as float32 (n, 1).  Pure."""
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def bit_fields(packed: Bytes, width: int) -> Bytes:
    """Fields of `width` bits of each byte, the lowest first: (..., b) -> (..., 8 // width, b).  Pure."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields: Bytes = (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)
    return fields


def six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """(scales, minima), 8 of 6 bits each, from the 12 bytes that Q4_K and Q5_K keep them in.  (n, 12) -> two (n, 8).

    Bytes 0-3 and 4-7 hold the first four scales and minima in their low six bits; bytes 8-11 hold the low nibbles of
    the last four (scale low, minimum high), whose top two bits are the top two bits of bytes 0-3 and 4-7.  Pure.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    six, four, top = np.uint8(63), np.uint8(15), np.uint8(6)
    scales = np.concatenate([first & six, (third & four) | ((first >> top) << np.uint8(4))], axis=-1)
    minima = np.concatenate([second & six, (third >> np.uint8(4)) | ((second >> top) << np.uint8(4))], axis=-1)
    return scales, minima


def decode_q2_k(blocks: Bytes, out: Float32) -> None:
    """scales (16), q (64), d, dmin: 84 bytes.  Writes `out` (n, 256).  [QT-K-1]"""
    num = len(blocks)
    scales = blocks[:, :16]
    quanta = bit_fields(blocks[:, 16:80].reshape(num, 2, 32), 2).reshape(num, 16, 16)
    step = half(blocks, 80) * (scales & np.uint8(15)).astype(np.float32)
    floor = half(blocks, 82) * (scales >> np.uint8(4)).astype(np.float32)
    np.subtract(step[..., None] * quanta, floor[..., None], out=out.reshape(num, 16, 16))


def decode_q3_k(blocks: Bytes, out: Float32) -> None:
    """third bits (32), q (64), scales (12), d: 110 bytes.  Writes `out` (n, 256).  [QT-K-1]"""
    num = len(blocks)
    low = bit_fields(blocks[:, 32:96].reshape(num, 2, 32), 2).reshape(num, 256)
    third = bit_fields(blocks[:, :32], 1).reshape(num, 256)
    quanta = (low | (third << np.uint8(2))).view(np.int8) - np.int8(4)
    nibbles = bit_fields(blocks[:, 96:104], 4).reshape(num, 16)
    top = bit_fields(blocks[:, 104:108], 2).reshape(num, 16)
    scales = (nibbles | (top << np.uint8(4))).view(np.int8) - np.int8(32)
    step = half(blocks, 108) * scales.astype(np.float32)
    np.multiply(step[..., None], quanta.reshape(num, 16, 16), out=out.reshape(num, 16, 16))


def decode_q4_k(blocks: Bytes, out: Float32) -> None:
    """d, dmin, scales and minima (12), q (128): 144 bytes.  Writes `out` (n, 256).  [QT-K-1]"""
    num = len(blocks)
    _scale_and_shift(blocks, bit_fields(blocks[:, 16:].reshape(num, 4, 32), 4).reshape(num, 8, 32), out)


def decode_q5_k(blocks: Bytes, out: Float32) -> None:
    """d, dmin, scales and minima (12), fifth bits (32), q (128): 176 bytes.  Writes `out` (n, 256).  [QT-K-1]"""
    num = len(blocks)
    fifth = bit_fields(blocks[:, 16:48], 1)
    low = bit_fields(blocks[:, 48:].reshape(num, 4, 32), 4).reshape(num, 8, 32)
    _scale_and_shift(blocks, low | (fifth << np.uint8(4)), out)


def decode_q6_k(blocks: Bytes, out: Float32) -> None:
    """low nibbles (128), top pairs (64), int8 scales (16), d: 210 bytes.  Writes `out` (n, 256).  [QT-K-1]"""
    num = len(blocks)
    low = bit_fields(blocks[:, :128].reshape(num, 2, 64), 4).reshape(num, 256)
    top = bit_fields(blocks[:, 128:192].reshape(num, 2, 32), 2).reshape(num, 256)
    quanta = (low | (top << np.uint8(4))).view(np.int8) - np.int8(32)
    step = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    np.multiply(step[..., None], quanta.reshape(num, 16, 16), out=out.reshape(num, 16, 16))


def _scale_and_shift(blocks: Bytes, quanta: Bytes, out: Float32) -> None:
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    step = half(blocks, 0) * scales.astype(np.float32)
    floor = half(blocks, 2) * minima.astype(np.float32)
    np.subtract(step[..., None] * quanta, floor[..., None], out=out.reshape(len(blocks), 8, 32))
