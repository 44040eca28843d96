"""ggml's 5-bit blocks of 32: a nibble per element and the fifth bits gathered in one 32-bit word.

    Q5_0   d (f16), h (4 bytes), 16 bytes of nibbles                value = d * (q - 16)
    Q5_1   d (f16), m (f16), h (4 bytes), 16 bytes of nibbles       value = d * q + m
    q of element i: nibble i (low nibbles first, as in Q4_0) and, as bit 4, bit i of h.

Clauses: QT-FIVE-1..2 (specs/quant.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


def quanta_of(high: Bytes, nibbles: Bytes) -> Bytes:
    """The 32 values in [0, 32) of each block.  high (n, 4), nibbles (n, 16) uint8 -> (n, 32) uint8.  Pure."""
    fifth = np.unpackbits(high, axis=-1, bitorder="little")
    low = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
    quanta: Bytes = low | (fifth << np.uint8(4))
    return quanta


def packed_quanta(quanta: Bytes) -> Bytes:
    """The inverse of `quanta_of`: (n, 32) uint8 below 32 -> (n, 20) uint8, the high bits first.  Pure."""
    high = np.packbits(quanta >> np.uint8(4), axis=-1, bitorder="little")
    nibbles = (quanta[:, :16] & np.uint8(15)) | ((quanta[:, 16:] & np.uint8(15)) << np.uint8(4))
    return np.concatenate([high, nibbles], axis=-1)


def decode_q5_0(blocks: Bytes, out: Float32) -> None:
    """out (n, 32) = d * (q - 16) of blocks (n, 22).  Writes `out`.  [QT-FIVE-1]"""
    np.copyto(out, quanta_of(blocks[:, 2:6], blocks[:, 6:]).view(np.int8) - np.int8(16))
    out *= blocks[:, :2].copy().view("<f2").astype(np.float32)


def decode_q5_1(blocks: Bytes, out: Float32) -> None:
    """out (n, 32) = d * q + m of blocks (n, 24).  Writes `out`.  [QT-FIVE-1]"""
    np.copyto(out, quanta_of(blocks[:, 4:8], blocks[:, 8:]))
    out *= blocks[:, :2].copy().view("<f2").astype(np.float32)
    out += blocks[:, 2:4].copy().view("<f2").astype(np.float32)
