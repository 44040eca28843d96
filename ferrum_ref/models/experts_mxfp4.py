"""MXFP4 as gpt-oss's own files have it, told in BF16, which holds every value exactly.

    value = s * {0, 0.5, 1, 1.5, 2, 3, 4, 6} * 2**(scale - 127)      32 elements a scale

The low nibble of a byte is the earlier element (ggml: sixteen elements earlier); a scale of 255 is NaN.
Clause: MD-EXPERT-4 (specs/decoder_families.md).  Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6.3.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ShapeError

BLOCK_BYTES: Final = 16
_BIAS: Final = 127
_NAN_SCALE: Final = 255
_POSITIVE: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_as_bf16(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], *, halves: bool = False) -> NDArray[np.uint8]:
    """blocks `[..., G, 16]`, scales `[..., G]` -> the BF16 bytes of `[..., G * 32]`, uint8 `[..., G * 64]`.

    `halves`: ggml's order, low nibbles are a block's first 16 elements and high ones the others.
    Pure.  [MD-EXPERT-4]  Raises ShapeError for other shapes.
    """
    if blocks.shape != (*scales.shape, BLOCK_BYTES):
        raise ShapeError(f"MXFP4: blocks {blocks.shape}, expected scales' shape {scales.shape} and {BLOCK_BYTES} bytes")
    table: NDArray[Any] = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], dtype=np.float64)
    both = np.stack([blocks & 0x0F, blocks >> 4], axis=-2 if halves else -1)
    nibbles = both.reshape(*scales.shape, 2 * BLOCK_BYTES)
    powers = np.ldexp(1.0, scales.astype(np.int32) - _BIAS)
    powers[scales == _NAN_SCALE] = np.nan
    with np.errstate(over="ignore"):
        values = (table[nibbles] * powers[..., None]).astype(ml_dtypes.bfloat16)
    flat = np.ascontiguousarray(values.reshape(*scales.shape[:-1], -1))
    return flat.view(np.uint8)
