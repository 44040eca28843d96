"""ggml's packed formats as LLVM vector code: the weights of a block, decoded exactly, a vector at a time.

    block of 32    Q4_0  d (q - 8)     Q4_1  d q + m     Q5_0  d (q - 16)     Q5_1  d q + m     Q8_0  d q
    block of 256   Q2_K, Q4_K, Q5_K  (d s) q - dmin n     Q3_K  (d (s - 32)) (q - 4)     Q6_K  (d s) (q - 32)
    d, m, dmin float16; s and n small integers, one for 16 weights (Q2_K, Q3_K, Q6_K) or 32 (Q4_K, Q5_K)

All products here are exact in float32, so that only the one sum or difference rounds: the numbers are bit for bit those
of ggml's own dequantisation, with infinite and NaN scales too.
Source: ggml-common.h (the layouts), ggml-quants.c (dequantize_row_*).  Clauses: BK-NCPU-22 (specs/backend_numba.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from llvmlite import ir

from ferrum_numba.cpu.lanes import (
    BYTE,
    FLOAT,
    HALF,
    INT,
    LANES,
    VECTOR,
    fused,
    half_to_float,
    lane_spread,
    like,
    load,
    spread,
    wider,
)

BLOCK: Final = 32
SUPER_BLOCK: Final = 256
_INTS: Final = ir.VectorType(INT, LANES)

Head = list[Any]  # vectors of a block's scales, as `weights` of the same format wants them


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One format: `head` loads a block's scales, `weights` its numbers first .. first + LANES - 1 as float32."""

    name: str
    num_elements: int
    num_bytes: int
    head: Callable[[Any, Any], Head]  # (builder, block)
    weights: Callable[[Any, Any, Head, int], Any]  # (builder, block, head, first)


def _bits(builder: Any, block: Any, offset: int, start: int, width: int, target: int = 0) -> Any:
    """Bits start .. start + width - 1 of LANES bytes, moved to bit `target` of as many integers."""
    found = builder.zext(load(builder, block, offset, BYTE, LANES), _INTS)
    if start > target:
        found = builder.lshr(found, like(_INTS, start - target))
    elif start < target:
        found = builder.shl(found, like(_INTS, target - start))
    if target == 0 and start + width == 8:
        return found
    return builder.and_(found, like(_INTS, (1 << width) - 1 << target))


def _half(builder: Any, block: Any, offset: int, count: int = LANES) -> Any:
    """The float16 number at an offset, in every lane; spread first, which processors can do as they load."""
    return half_to_float(builder, spread(builder, load(builder, block, offset, HALF, 1), count))


def _halves(builder: Any, block: Any, *, offsets: tuple[int, ...]) -> Head:
    return [_half(builder, block, offset) for offset in offsets]


def _scaled(builder: Any, quanta: Any, zero: int, scale: Any) -> Any:
    """scale (q - zero)"""
    if zero:
        quanta = builder.sub(quanta, like(_INTS, zero))
    return builder.fmul(builder.sitofp(quanta, VECTOR), scale)


def _nibbles(builder: Any, block: Any, start: int, first: int) -> Any:
    """Of a block of 32 whose 16 bytes of nibbles begin at `start`: low nibbles first."""
    return _bits(builder, block, start + first % 16, 4 * (first // 16), 4)


def _fifth_bits(builder: Any, block: Any, start: int, first: int) -> Any:
    """16 where bit `first` + lane of the word at `start` is set."""
    mask = builder.bitcast(load(builder, block, start + first // 8, ir.IntType(LANES), 1), wider(_INTS, ir.IntType(1)))
    return builder.select(mask, like(_INTS, 16), like(_INTS, 0))


def _q4_0(builder: Any, block: Any, head: Head, first: int) -> Any:
    return _scaled(builder, _nibbles(builder, block, 2, first), 8, head[0])


def _q4_1(builder: Any, block: Any, head: Head, first: int) -> Any:
    return fused(builder, builder.sitofp(_nibbles(builder, block, 4, first), VECTOR), head[0], head[1])


def _q5_0(builder: Any, block: Any, head: Head, first: int) -> Any:
    quanta = builder.or_(_nibbles(builder, block, 6, first), _fifth_bits(builder, block, 2, first))
    return _scaled(builder, quanta, 16, head[0])


def _q5_1(builder: Any, block: Any, head: Head, first: int) -> Any:
    quanta = builder.or_(_nibbles(builder, block, 8, first), _fifth_bits(builder, block, 4, first))
    return fused(builder, builder.sitofp(quanta, VECTOR), head[0], head[1])


def _q8_0(builder: Any, block: Any, head: Head, first: int) -> Any:
    return _scaled(builder, builder.sext(load(builder, block, 2 + first, BYTE, LANES), _INTS), 0, head[0])


def _floats_of_bytes(builder: Any, integers: list[Any]) -> Any:
    """The bytes of 32-bit integers, in order, as a vector of float32."""
    together = ir.Constant(ir.VectorType(INT, len(integers)), ir.Undefined)
    for place, value in enumerate(integers):
        together = builder.insert_element(together, value, ir.Constant(INT, place))
    count = 4 * len(integers)
    wide = builder.zext(builder.bitcast(together, ir.VectorType(BYTE, count)), ir.VectorType(INT, count))
    return builder.sitofp(wide, ir.VectorType(FLOAT, count))


def _each_byte(builder: Any, value: Any, start: int, width: int, target: int = 0) -> Any:
    """Bits start .. start + width - 1 of each of an integer's four bytes, moved to bit `target` of that byte."""
    move = builder.lshr if start >= target else builder.shl
    moved = move(value, ir.Constant(INT, abs(start - target)))
    return builder.and_(moved, ir.Constant(INT, 0x01010101 * ((1 << width) - 1 << target)))


def _six_bit_pairs(builder: Any, block: Any) -> Head:
    """Q4_K and Q5_K: the 8 steps d s and the 8 floors -dmin n, of which s and n have six bits each in 12 bytes."""
    first, second, third = (load(builder, block, offset, INT, 1) for offset in (4, 8, 12))
    take = partial(_each_byte, builder)
    steps = [take(first, 0, 6), builder.or_(take(third, 0, 4), take(first, 6, 2, 4))]
    floors = [take(second, 0, 6), builder.or_(take(third, 4, 4), take(second, 6, 2, 4))]
    d, dmin = (_half(builder, block, offset, 8) for offset in (0, 2))
    return [
        builder.fmul(d, _floats_of_bytes(builder, steps)),
        builder.fneg(builder.fmul(dmin, _floats_of_bytes(builder, floors))),
    ]


def _q4_k(builder: Any, block: Any, head: Head, first: int) -> Any:
    step, floor = (lane_spread(builder, each, first // 32) for each in head)
    quanta = _bits(builder, block, 16 + first // 64 * 32 + first % 32, first // 32 % 2 * 4, 4)
    return fused(builder, builder.sitofp(quanta, VECTOR), step, floor)


def _q5_k(builder: Any, block: Any, head: Head, first: int) -> Any:
    step, floor = (lane_spread(builder, each, first // 32) for each in head)
    low = _bits(builder, block, 48 + first // 64 * 32 + first % 32, first // 32 % 2 * 4, 4)
    fifth = _bits(builder, block, 16 + first % 32, first // 32, 1, 4)
    return fused(builder, builder.sitofp(builder.or_(low, fifth), VECTOR), step, floor)


def _pairs(builder: Any, block: Any, start: int, first: int, target: int = 0) -> Any:
    """Two bits of each weight: 32 bytes for 128 weights, the lowest bits those of the first 32."""
    return _bits(builder, block, start + first // 128 * 32 + first % 32, first // 32 % 4 * 2, 2, target)


def _q2_k_head(builder: Any, block: Any) -> Head:
    bytes_ = builder.zext(load(builder, block, 0, BYTE, 16), ir.VectorType(INT, 16))
    floats = ir.VectorType(FLOAT, 16)
    steps = builder.sitofp(builder.and_(bytes_, like(bytes_.type, 15)), floats)
    floors = builder.sitofp(builder.lshr(bytes_, like(bytes_.type, 4)), floats)
    d, dmin = (_half(builder, block, offset, 16) for offset in (80, 82))
    return [builder.fmul(d, steps), builder.fneg(builder.fmul(dmin, floors))]


def _q2_k(builder: Any, block: Any, head: Head, first: int) -> Any:
    step, floor = (lane_spread(builder, each, first // 16) for each in head)
    return fused(builder, builder.sitofp(_pairs(builder, block, 16, first), VECTOR), step, floor)


def _q3_k_head(builder: Any, block: Any) -> Head:
    low = [load(builder, block, offset, INT, 1) for offset in (96, 100)]
    top = load(builder, block, 104, INT, 1)
    take = partial(_each_byte, builder)
    parts = [builder.or_(take(low[i % 2], i // 2 * 4, 4), take(top, 2 * i, 2, 4)) for i in range(4)]
    scales = _floats_of_bytes(builder, parts)
    return [builder.fmul(_half(builder, block, 108, 16), builder.fsub(scales, like(scales.type, 32.0)))]


def _q3_k(builder: Any, block: Any, head: Head, first: int) -> Any:
    third = _bits(builder, block, first % 32, first // 32, 1, 2)
    quanta = builder.or_(_pairs(builder, block, 32, first), third)
    return _scaled(builder, quanta, 4, lane_spread(builder, head[0], first // 16))


def _q6_k_head(builder: Any, block: Any) -> Head:
    scales = builder.sext(load(builder, block, 192, BYTE, 16), ir.VectorType(INT, 16))
    d = _half(builder, block, 208, 16)
    return [builder.fmul(d, builder.sitofp(scales, d.type))]


def _q6_k(builder: Any, block: Any, head: Head, first: int) -> Any:
    low = _bits(builder, block, first // 128 * 64 + first % 64, first // 64 % 2 * 4, 4)
    quanta = builder.or_(low, _pairs(builder, block, 128, first, 4))
    return _scaled(builder, quanta, 32, lane_spread(builder, head[0], first // 16))


_SCALE: Final = partial(_halves, offsets=(0,))
_SCALE_AND_FLOOR: Final = partial(_halves, offsets=(0, 2))
# The numbers that kernels know the formats by; 0 to 3 are the plain kinds of `vector`.
Q8_0: Final = 4
Q4_0: Final = 5
BLOCK_FORMATS: Final[Mapping[int, BlockFormat]] = MappingProxyType(
    {
        Q8_0: BlockFormat("q8_0", BLOCK, 34, _SCALE, _q8_0),
        Q4_0: BlockFormat("q4_0", BLOCK, 18, _SCALE, _q4_0),
        6: BlockFormat("q4_1", BLOCK, 20, _SCALE_AND_FLOOR, _q4_1),
        7: BlockFormat("q5_0", BLOCK, 22, _SCALE, _q5_0),
        8: BlockFormat("q5_1", BLOCK, 24, _SCALE_AND_FLOOR, _q5_1),
        9: BlockFormat("q2_k", SUPER_BLOCK, 84, _q2_k_head, _q2_k),
        10: BlockFormat("q3_k", SUPER_BLOCK, 110, _q3_k_head, _q3_k),
        11: BlockFormat("q4_k", SUPER_BLOCK, 144, _six_bit_pairs, _q4_k),
        12: BlockFormat("q5_k", SUPER_BLOCK, 176, _six_bit_pairs, _q5_k),
        13: BlockFormat("q6_k", SUPER_BLOCK, 210, _q6_k_head, _q6_k),
    }
)
