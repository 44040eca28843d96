"""One packing of 4-bit weights to another: ggml's Q4_0 and that of an upstream Metal kernel.   Clauses: KN-REPACK-1..2.

    ggml   18 bytes: d (f16), 16 bytes; byte i holds element i (low nibble) and element i + 16 (high nibble)
    metal  20 bytes: d (f32), 16 bytes; byte i holds element 2i (low nibble) and element 2i + 1 (high nibble)

Both mean d * (q - 8); the quanta themselves are the same.  All multi-byte fields are little-endian.
"""

from __future__ import annotations

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.rounding import Array

_GGML_BYTES, _METAL_BYTES = 18, 20


def q4_0_from_metal(packed: Array) -> Array:
    """Metal's blocks as ggml's: (..., 20 n) uint8 -> (..., 18 n) uint8 (D-54)          [KN-REPACK-1..2]

    Pure. Raises ShapeError for anything but whole blocks of uint8; InvalidParameterError for a scale no float16 is.
    """
    blocks = _blocks("q4_0_from_metal", packed, _METAL_BYTES)
    scale = np.ascontiguousarray(blocks[..., :4]).view("<f4")
    with np.errstate(all="ignore"):
        half = scale.astype("<f2")
        exact = half.astype("<f4") == scale
    if not exact.all():
        raise InvalidParameterError(
            f"q4_0_from_metal: scale {float(scale[~exact][0])!r}, expected a number that float16 holds exactly; "
            "unpack the weights and encode them anew"
        )
    low, high = blocks[..., 4:] & 15, blocks[..., 4:] >> 4
    quanta = np.stack((low, high), -1).reshape(*low.shape[:-1], 32)  # in element order
    nibbles = quanta[..., :16] | quanta[..., 16:] << 4
    return _joined(half.view(np.uint8), nibbles, packed.shape)


def q4_0_to_metal(packed: Array) -> Array:
    """ggml's blocks as Metal's: (..., 18 n) uint8 -> (..., 20 n) uint8 (D-54); exact.          [KN-REPACK-1]

    Pure. Raises ShapeError for anything but whole blocks of uint8.
    """
    blocks = _blocks("q4_0_to_metal", packed, _GGML_BYTES)
    with np.errstate(all="ignore"):
        scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype("<f4")
    quanta = np.concatenate((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1)
    return _joined(scale.view(np.uint8), quanta[..., 0::2] | quanta[..., 1::2] << 4, packed.shape)


def _blocks(operation: str, packed: Array, block_bytes: int) -> Array:
    if packed.dtype != np.uint8 or packed.ndim < 1 or packed.shape[-1] % block_bytes:
        raise ShapeError(
            f"{operation}: packed {packed.dtype}{list(packed.shape)}, expected uint8 with a last dimension that is a "
            f"multiple of {block_bytes}"
        )
    return packed.reshape(*packed.shape[:-1], packed.shape[-1] // block_bytes, block_bytes)


def _joined(scale: Array, nibbles: Array, shape: tuple[int, ...]) -> Array:
    blocks = np.concatenate((scale, nibbles), -1)
    return blocks.reshape(*shape[:-1], blocks.shape[-2] * blocks.shape[-1])
