"""INT8 and INT4 by groups of inputs, FP8 with scales: a number per element, a scale per group, row, block or tensor.

    symmetric    W = q * s              q in [-(2**(bits-1) - 1), 2**(bits-1) - 1]
    asymmetric   W = (q - z) * s        q, z in [0, 2**bits - 1]
    FP8          W = f * s              f an E4M3FN or E5M2 number; s per tensor, per row, or per (rows, columns) block

INT4 is packed two to a byte, the low nibble first, two's complement where symmetric.
Clauses: QT-GROUP-1..3, QT-FP8-1..3 (specs/quant.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError

Float32 = NDArray[np.float32]
Fp8Format = Literal["e4m3", "e5m2"]


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """A matrix (N, K) of integers: `quanta` (N, K) int8 or uint8 (packed (N, K / 2) uint8 for 4 bits), `scales` and
    `zeros` (N, K / group_size); `zeros` None is symmetric."""

    quanta: NDArray[Any]
    scales: Float32
    zeros: NDArray[Any] | None
    bits: Literal[4, 8]
    group_size: int


def encode_groups(values: NDArray[Any], bits: Literal[4, 8], group_size: int, *, symmetric: bool) -> GroupWeights:
    """Round to nearest within each group of `group_size` inputs (-1: the whole row).  Pure.  [QT-GROUP-1..2]

    symmetric: s = max|x| / (2**(bits-1) - 1), q = rint(x / s), error at most s / 2.  asymmetric: low = min(x, 0),
    high = max(x, 0), s = (high - low) / (2**bits - 1), z = rint(-low / s), q = rint(x / s) + z, the same bound.
    A group of zeros has s = 0.  Raises InvalidParameterError on NaN, infinity, bits, or a group_size that does not
    divide K; ShapeError unless values is (N, K), K even for 4 bits.
    """
    if bits not in (4, 8):
        raise InvalidParameterError(f"encode_groups: bits: got {bits}, expected 4 or 8")
    if values.ndim != 2 or (bits == 4 and values.shape[1] % 2):
        raise ShapeError(f"encode_groups: values: got {list(values.shape)}, expected (N, K), K even for 4 bits")
    size = values.shape[1] if group_size == -1 else group_size
    if size < 1 or values.shape[1] % size:
        raise InvalidParameterError(
            f"encode_groups: group_size: got {group_size}, expected -1 or a divisor of {values.shape[1]}"
        )
    if not np.isfinite(values).all():
        raise InvalidParameterError("encode_groups: values: got NaN or infinity, expected finite numbers")
    grouped = values.astype(np.float32).reshape(len(values), -1, size)
    low, high = np.minimum(grouped.min(axis=-1), 0), np.maximum(grouped.max(axis=-1), 0)
    if symmetric:
        top = (1 << (bits - 1)) - 1
        scales = np.maximum(-low, high) / np.float32(top)
        quanta = np.rint(_divide(grouped, scales[..., None])).clip(-top, top).astype(np.int8)
        zeros = None
    else:
        top = (1 << bits) - 1
        scales = (high - low) / np.float32(top)
        zeros = np.rint(_divide(-low, scales)).clip(0, top).astype(np.uint8)
        quanta = (np.rint(_divide(grouped, scales[..., None])) + zeros[..., None]).clip(0, top).astype(np.uint8)
    flat = quanta.reshape(values.shape)
    return GroupWeights(_pack_nibbles(flat) if bits == 4 else flat, scales, zeros, bits, group_size)


def decode_groups(weights: GroupWeights) -> Float32:
    """W (N, K) float32, one rounding.  Pure.  [QT-GROUP-1]  Raises ShapeError when the parts do not fit each other."""
    quanta = weights.quanta
    if weights.bits == 4:
        nibbles = np.stack([quanta & np.uint8(15), quanta >> np.uint8(4)], axis=-1).reshape(len(quanta), -1)
        quanta = ((nibbles << np.uint8(4)).view(np.int8) >> np.int8(4)) if weights.zeros is None else nibbles
    num_groups = weights.scales.shape[-1] if weights.scales.ndim == 2 else 0
    if quanta.ndim != 2 or not num_groups or len(weights.scales) != len(quanta) or quanta.shape[1] % num_groups:
        raise ShapeError(
            f"decode_groups: scales: got {list(weights.scales.shape)}, expected (N, groups) for {list(quanta.shape)}"
        )
    levels = quanta.reshape(len(quanta), num_groups, -1).astype(np.float32)
    if weights.zeros is not None:
        levels -= weights.zeros[..., None].astype(np.float32)
    levels *= weights.scales[..., None]
    return levels.reshape(quanta.shape)


def decode_fp8(bits: NDArray[np.uint8], scale: NDArray[Any], fp8: Fp8Format = "e4m3") -> Float32:
    """W (N, K) float32 = f * s.  Pure.  [QT-FP8-1]

    scale: one number; (N,) or (N, 1), a scale a row; or (ceil(N / r), ceil(K / c)), a scale for each block of r x c
    elements, r = ceil(N / rows of scale) rounded up to a power of two, c likewise (DeepSeek-V3: 128 x 128).  NaN (and
    E5M2's infinities) decode to themselves.  Raises ShapeError for another shape.
    """
    numbers = bits.view(ml_dtypes.float8_e4m3fn if fp8 == "e4m3" else ml_dtypes.float8_e5m2).astype(np.float32)
    values: Float32 = numbers * _spread(scale.astype(np.float32), numbers.shape)
    return values


def encode_fp8(
    values: NDArray[Any], *, fp8: Fp8Format = "e4m3", block: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], Float32]:
    """(bits, scale), scale = max|x| / the largest number (448 or 57344), per tensor or per block.  Pure.  [QT-FP8-2]

    f = x / s in float32, rounded to nearest, ties to even; saturated against the division's rounding.  The error is at
    most half the spacing of f at x / s, times s.  A block of zeros has scale 1.
    Raises InvalidParameterError on NaN or infinity, or a block side that is no power of two; ShapeError unless (N, K).
    """
    if values.ndim != 2:
        raise ShapeError(f"encode_fp8: values: got {list(values.shape)}, expected (N, K)")
    if not np.isfinite(values).all():
        raise InvalidParameterError("encode_fp8: values: got NaN or infinity, expected finite numbers")
    source = values.astype(np.float32)
    largest = np.float32(448 if fp8 == "e4m3" else 57344)
    if block is None:
        scale = np.asarray(np.abs(source).max(initial=0) / largest, np.float32)
    else:
        if any(side < 1 or side & (side - 1) for side in block):
            raise InvalidParameterError(f"encode_fp8: block: got {block}, expected powers of two")
        rows, columns = (range(0, extent, side) for extent, side in zip(source.shape, block))
        scale = np.array(
            [[np.abs(source[r : r + block[0], c : c + block[1]]).max() / largest for c in columns] for r in rows],
            np.float32,
        )
    scale = np.where(scale == 0, np.float32(1), scale)
    wide = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[: len(source), : source.shape[1]] if block else scale
    scaled = (source / wide).clip(-largest, largest)
    return scaled.astype(ml_dtypes.float8_e4m3fn if fp8 == "e4m3" else ml_dtypes.float8_e5m2).view(np.uint8), scale


def fp8_block(scale_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) that share a scale: the powers of two that make blocks of a matrix (N, K) from a scale's shape.

    One number: (N, K).  (N,) or (N, 1): (1, K).  Pure.  Raises ShapeError for a shape that no such block gives.
    """
    if len(shape) == 2:
        if math.prod(scale_shape) == 1:
            return max(1, shape[0]), max(1, shape[1])
        if scale_shape in ((shape[0],), (shape[0], 1)):
            return 1, max(1, shape[1])
        if len(scale_shape) == 2 and 0 not in (*scale_shape, *shape):
            sides = [1 << (-(-extent // count) - 1).bit_length() for extent, count in zip(shape, scale_shape)]
            if all(-(-extent // side) == count for extent, side, count in zip(shape, sides, scale_shape)):
                return sides[0], sides[1]
    raise ShapeError(
        f"decode_fp8: scale: got {list(scale_shape)}, expected one number, one a row, or one a block of {list(shape)}"
    )


def _spread(scale: Float32, shape: tuple[int, ...]) -> Float32:
    if scale.size == 1:
        return scale.reshape(())
    rows, columns = fp8_block(scale.shape, shape)
    if rows == 1:
        scale = scale.reshape(shape[0], -1)
    if scale.shape[1] == 1:
        columns = 1  # a broadcast does as well
    wide: Float32 = np.repeat(np.repeat(scale, rows, 0), columns, 1)[: shape[0], : shape[1]]
    return wide


def _pack_nibbles(quanta: NDArray[Any]) -> NDArray[np.uint8]:
    nibbles = quanta.view(np.uint8) & np.uint8(15)
    packed: NDArray[np.uint8] = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return packed


def _divide(values: Float32, scales: Float32) -> Float32:
    return np.divide(values, scales, out=np.zeros_like(values), where=np.broadcast_to(scales != 0, values.shape))
