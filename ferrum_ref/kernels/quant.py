"""Packed weights: the element formats of model files, decoded to float32 and encoded from it.

    F64, F32, F16, BF16   one number per element; F8_E4M3, F8_E5M2: FP8 numbers without a scale (E4M3FN, E5M2)
    Q8_0   block of 32: d (f16), 32 x int8                       value = d * q
    Q4_0   block of 32: d (f16), 16 bytes                        value = d * (q - 8)
    Q4_1   block of 32: d (f16), m (f16), 16 bytes               value = d * q + m
    4-bit blocks: the low nibble of byte i is element i, the high nibble is element i + 16.
    Q5_0, Q5_1 (quant_five), Q2_K … Q6_K (quant_k, encoding in quant_k_encode)

Decoding equals ggml's own dequantisation bit for bit: d * q needs at most 19 bits, the sums and the K-quants' products
are rounded once each.  All multi-byte fields are little-endian.
Clauses: MD-QUANT-1..6 (specs/model_files.md), QT-FIVE-1..2, QT-K-1..3 (specs/quant.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.kernels.quant_five import decode_q5_0, decode_q5_1, packed_quanta
from ferrum_ref.kernels.quant_k import decode_q2_k, decode_q3_k, decode_q4_k, decode_q5_k, decode_q6_k
from ferrum_ref.kernels.quant_k_encode import encode_q4_k, encode_q6_k

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]

_FINITE_CHUNK: Final = 1 << 18  # blocks or numbers that are looked at together
_CHUNK_BLOCKS: Final = 2048  # 256 KiB of decoded output: it and its inputs stay in a core's L2 cache


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How many elements share a block, and how many bytes the block takes."""

    name: str
    block_elements: int
    block_bytes: int

    def packed_bytes(self, num_elements: int) -> int:
        """Bytes that `num_elements` take; raises ShapeError unless they fill whole blocks."""
        if num_elements % self.block_elements:
            raise ShapeError(
                f"quant {self.name}: got {num_elements} elements, expected a multiple of {self.block_elements}"
            )
        return num_elements // self.block_elements * self.block_bytes


FORMATS: Final[Mapping[str, QuantFormat]] = MappingProxyType(
    {
        "F64": QuantFormat("F64", 1, 8),
        "F32": QuantFormat("F32", 1, 4),
        "F16": QuantFormat("F16", 1, 2),
        "BF16": QuantFormat("BF16", 1, 2),
        "F8_E4M3": QuantFormat("F8_E4M3", 1, 1),
        "F8_E5M2": QuantFormat("F8_E5M2", 1, 1),
        "Q4_0": QuantFormat("Q4_0", 32, 18),
        "Q4_1": QuantFormat("Q4_1", 32, 20),
        "Q5_0": QuantFormat("Q5_0", 32, 22),
        "Q5_1": QuantFormat("Q5_1", 32, 24),
        "Q8_0": QuantFormat("Q8_0", 32, 34),
        "Q2_K": QuantFormat("Q2_K", 256, 84),
        "Q3_K": QuantFormat("Q3_K", 256, 110),
        "Q4_K": QuantFormat("Q4_K", 256, 144),
        "Q5_K": QuantFormat("Q5_K", 256, 176),
        "Q6_K": QuantFormat("Q6_K", 256, 210),
    }
)

_SCALE_FIELDS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(  # byte offsets of a block's float16 fields
    {
        "Q4_0": (0,),
        "Q4_1": (0, 2),
        "Q5_0": (0,),
        "Q5_1": (0, 2),
        "Q8_0": (0,),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
    }
)
_FP8: Final[Mapping[str, Any]] = MappingProxyType(
    {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
)
_PLAIN: Final[Mapping[str, Any]] = MappingProxyType(
    {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, **_FP8}
)
_DECODERS: Final[Mapping[str, Callable[[Bytes, Float32], None]]] = MappingProxyType(
    {
        "Q5_0": decode_q5_0,
        "Q5_1": decode_q5_1,
        "Q2_K": decode_q2_k,
        "Q3_K": decode_q3_k,
        "Q4_K": decode_q4_k,
        "Q5_K": decode_q5_k,
        "Q6_K": decode_q6_k,
    }
)


def quant_format(name: str) -> QuantFormat:
    """The format called `name`.  Raises UnsupportedError listing the known ones.  [MD-QUANT-1]"""
    if name not in FORMATS:
        raise UnsupportedError(f"quant format: got {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def decode(name: str, packed: Bytes, out: Float32 | None = None) -> Float32:
    """The float32 values of packed bytes, in element order.  [MD-QUANT-2, MD-QUANT-3]

    packed (..., row_bytes) uint8, C-contiguous; the result has shape (..., row_elements).  Writes `out` when it is
    given (same shape, float32, C-contiguous) and returns it; otherwise pure.
    Raises ShapeError on a row that is not whole blocks or an `out` that does not fit; UnsupportedError on the name.
    Source: ggml's dequantize_row_q4_0, dequantize_row_q4_1, dequantize_row_q8_0.
    """
    layout = quant_format(name)
    row_bytes = packed.shape[-1] if packed.ndim else 0
    if packed.dtype != np.uint8 or packed.ndim == 0 or row_bytes % layout.block_bytes:
        raise ShapeError(
            f"decode {name}: packed: got {packed.dtype}{list(packed.shape)}, "
            f"expected uint8 with a last dimension that is a multiple of {layout.block_bytes}"
        )
    shape = (*packed.shape[:-1], row_bytes // layout.block_bytes * layout.block_elements)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ShapeError(
            f"decode {name}: out: got {out.dtype}{list(out.shape)}, expected C-contiguous float32{list(shape)}"
        )
    flat = np.ascontiguousarray(packed).reshape(-1)
    if layout.block_elements == 1:
        _decode_plain(name, flat, out.reshape(-1))
    else:
        _decode_blocks(name, flat.reshape(-1, layout.block_bytes), out.reshape(-1, layout.block_elements))
    return out


def is_finite(name: str, packed: Bytes) -> bool:
    """True when no element is NaN or infinite: by the scales of blocks, by the numbers of plain formats.  [MD-QUANT-7]

    packed as for `decode`, which it does not decode.  Pure.  Raises UnsupportedError on the name.
    """
    layout = quant_format(name)
    blocks = packed.reshape(-1, layout.block_bytes)
    for start in range(0, len(blocks), _FINITE_CHUNK):
        part = blocks[start : start + _FINITE_CHUNK]
        if layout.block_elements == 1:
            with np.errstate(invalid="ignore"):
                if not np.isfinite(part.view(_PLAIN[name])).all():
                    return False
        elif any(not np.isfinite(part[:, at : at + 2].view("<f2")).all() for at in _SCALE_FIELDS[name]):
            return False
    return True


def encode(name: str, values: NDArray[Any]) -> Bytes:
    """Packed bytes of float values; the inverse of `decode` up to the format's rounding.  [MD-QUANT-4..6]

    values (..., row_elements) any float dtype, taken as float32; the result is uint8 (..., row_bytes).  Pure.
    Raises ShapeError on a row that is not whole blocks; InvalidParameterError on NaN, infinity or a scale beyond
    float16 in a block format.  Source: ggml's quantize_row_*_ref.
    """
    layout = quant_format(name)
    if values.ndim == 0:
        raise ShapeError(f"encode {name}: values: got a scalar, expected at least one dimension")
    row_bytes = layout.packed_bytes(values.shape[-1])
    source = np.ascontiguousarray(values, dtype=np.float32)
    if layout.block_elements == 1:
        packed = _encode_plain(name, source.reshape(-1))
    else:
        packed = _encode_blocks(name, source.reshape(-1, layout.block_elements))
    return packed.reshape(*values.shape[:-1], row_bytes)


def _decode_plain(name: str, packed: Bytes, out: Float32) -> None:
    if name == "F32":
        np.copyto(out, packed.view("<f4"))
    elif name == "F64":
        with np.errstate(all="ignore"):  # a NaN is the file's value
            np.copyto(out, packed.view("<f8"), casting="same_kind")
    elif name == "F16":
        np.copyto(out, packed.view("<f2"))
    elif name in _FP8:
        np.copyto(out, packed.view(_FP8[name]))
    else:  # BF16 is the upper half of a float32
        np.left_shift(packed.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")


def _decode_blocks(name: str, packed: Bytes, out: Float32) -> None:
    """Chunks that fit in cache: widen the integers into `out`, then scale and shift it in place."""
    if (decoder := _DECODERS.get(name)) is not None:
        chunk = _CHUNK_BLOCKS * 32 // out.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):  # as below
            for start in range(0, len(packed), chunk):
                decoder(packed[start : start + chunk], out[start : start + chunk])
        return
    quanta = np.empty((min(_CHUNK_BLOCKS, len(packed)), 32), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or NaN: that is the file's value
        for start in range(0, len(packed), _CHUNK_BLOCKS):
            blocks, target = packed[start : start + _CHUNK_BLOCKS], out[start : start + _CHUNK_BLOCKS]
            scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
            if name == "Q8_0":
                np.copyto(target, blocks[:, 2:].view(np.int8))
                target *= scale
                continue
            nibbles = quanta[: len(blocks)]
            _split_nibbles(blocks[:, 2 if name == "Q4_0" else 4 :], nibbles)
            if name == "Q4_0":
                nibbles -= 8  # wraps; read back as int8 below
                np.copyto(target, nibbles.view(np.int8))
                target *= scale
            else:
                np.copyto(target, nibbles)
                target *= scale
                target += blocks[:, 2:4].copy().view("<f2").astype(np.float32)


def _split_nibbles(packed: Bytes, out: Bytes) -> None:
    """out[:, :16] = low nibbles, out[:, 16:] = high nibbles; two bytes at a time."""
    pairs, wide = packed.view(np.uint16), out.view(np.uint16)
    np.bitwise_and(pairs, 0x0F0F, out=wide[:, :8])
    np.right_shift(pairs, 4, out=wide[:, 8:])
    wide[:, 8:] &= 0x0F0F


def _encode_plain(name: str, values: Float32) -> Bytes:
    if name in ("F32", "F64"):
        return values.astype("<f4" if name == "F32" else "<f8").view(np.uint8)
    if name == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype("<f2").view(np.uint8)
    if name in _FP8:
        with np.errstate(all="ignore"):
            return values.astype(_FP8[name]).view(np.uint8)
    bits = values.view(np.uint32)
    quiet = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x00400000)
    rounded = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(nan, quiet, rounded) >> 16).astype("<u2").view(np.uint8)


def _encode_blocks(name: str, blocks: Float32) -> Bytes:
    if not np.isfinite(blocks).all():
        raise InvalidParameterError(f"encode {name}: values: got NaN or infinity, expected finite numbers")
    if name == "Q8_0":
        scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
        scaled = blocks * _reciprocal(scale)
        quanta = np.copysign(np.floor(np.abs(scaled)) + _half_up(scaled), scaled).astype(np.int8).view(np.uint8)
        return np.concatenate([_half_bytes(name, scale), quanta], axis=-1)
    if name == "Q4_0":
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
        scale = extreme / np.float32(-8)
        quanta = np.trunc(blocks * _reciprocal(scale) + np.float32(8.5))
        return np.concatenate([_half_bytes(name, scale), _join_nibbles(quanta)], axis=-1)
    if name == "Q5_0":
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
        scale = extreme / np.float32(-16)
        quanta = np.trunc(blocks * _reciprocal(scale) + np.float32(16.5)).clip(0, 31)
        return np.concatenate([_half_bytes(name, scale), packed_quanta(quanta.astype(np.uint8))], axis=-1)
    if name == "Q4_K":
        return encode_q4_k(blocks)
    if name == "Q6_K":
        return encode_q6_k(blocks)
    if name not in ("Q4_1", "Q5_1"):
        raise UnsupportedError(
            f"encode: got {name!r}, which is decoded only; expected another format, Q4_K or Q6_K say"
        )
    low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    levels = 15 if name == "Q4_1" else 31
    with np.errstate(over="ignore"):
        scale = (high - low) / np.float32(levels)
    head = [_half_bytes(name, scale), _half_bytes(name, low)]
    quanta = np.trunc((blocks - low) * _reciprocal(scale) + np.float32(0.5)).clip(0, levels)
    body = _join_nibbles(quanta) if name == "Q4_1" else packed_quanta(quanta.astype(np.uint8))
    return np.concatenate([*head, body], axis=-1)


def _reciprocal(scale: Float32) -> Float32:
    """1 / scale, and 0 where that is no float32: such a scale is 0 in float16 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half_up(values: Float32) -> Float32:
    """1 where the fraction of |values| is at least one half: ggml rounds away from zero, not to even."""
    magnitude = np.abs(values)
    return np.floor(np.float32(2) * (magnitude - np.floor(magnitude)))


def _half_bytes(name: str, values: Float32) -> Bytes:
    with np.errstate(over="ignore", under="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise InvalidParameterError(
            f"encode {name}: values: got a block scale or minimum of {np.abs(values).max():g}, expected at most 65504"
        )
    return half.view(np.uint8)


def _join_nibbles(quanta: Float32) -> Bytes:
    nibbles: Bytes = quanta.astype(np.uint8).clip(0, 15)
    return nibbles[:, :16] | (nibbles[:, 16:] << np.uint8(4))
