"""Any picture as the square one that a vision tower reads: shorter side resized, middle cut out, in exact integers.

    pixels = fit_image(rgb, width=640, height=480, size=336)

Clauses: FM-RESIZE-1..3 (specs/families.md).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ModelError
from ferrum_ref.interfaces.families_data import ImageBuffer

Pixels = npt.NDArray[np.uint8]

_WEIGHT_BITS: Final = 22  # fixed-point weights of the 8-bit filter
_CUBIC: Final = -0.5  # Catmull-Rom


def fit_image(rgb: ImageBuffer, width: int, height: int, size: int) -> ImageBuffer:
    """`width` x `height` raw RGB8 pixels as `size` x `size`: shorter side = size, then the middle.  [FM-RESIZE-1..3]

    Pure. Raises InvalidParameterError for a side below 1, ModelError for another number of bytes.
    """
    if min(width, height, size) < 1:
        raise InvalidParameterError(f"fit_image: {width} x {height} to {size} x {size}, expected sides of 1 or more")
    if len(rgb) != width * height * 3:
        raise ModelError(f"fit_image: {len(rgb)} bytes for {width} x {height}, expected {width * height * 3}")
    shorter = min(width, height)
    new_width, new_height = size * width // shorter, size * height // shorter
    image = resize_bicubic(np.frombuffer(rgb, dtype=np.uint8).reshape(height, width, 3), new_width, new_height)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return image[top : top + size, left : left + size].tobytes()


def resize_bicubic(image: Pixels, width: int, height: int) -> Pixels:
    """`[h, w, 3]` resized by a cubic filter as wide as the reduction: across first, then down.  Pure.  [FM-RESIZE-2]"""
    across = _filtered(image.transpose(1, 0, 2), width).transpose(1, 0, 2) if width != image.shape[1] else image
    return _filtered(across, height) if height != across.shape[0] else across


def _filtered(image: Pixels, size: int) -> Pixels:
    """The first axis resized to `size`; each pass rounds to bytes."""
    found = np.empty((size, *image.shape[1:]), dtype=np.uint8)
    for index in range(size):
        start, weights = _weights(index, image.shape[0], size)
        window = image[start : start + len(weights)].astype(np.int64)
        total = np.tensordot(weights, window, axes=1) + (1 << (_WEIGHT_BITS - 1))
        found[index] = np.clip(total >> _WEIGHT_BITS, 0, 255)
    return found


def _weights(index: int, old_size: int, new_size: int) -> tuple[int, npt.NDArray[np.int64]]:
    """First pixel and fixed-point weights of output pixel `index`.

    The filter is k(t) at t = (x + 1/2 - centre) / max(scale, 1), |t| < 2, with scale = old / new and
    centre = (index + 1/2) scale; the weights sum to 1 before they are rounded, half away from zero.
    """
    scale = old_size / new_size
    width = max(scale, 1.0)
    centre = (index + 0.5) * scale
    start = max(int(centre - 2 * width + 0.5), 0)
    end = min(int(centre + 2 * width + 0.5), old_size)
    distance = np.abs((np.arange(start, end) + 0.5 - centre) / width)
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
    kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    scaled = kernel / kernel.sum() * (1 << _WEIGHT_BITS)
    return start, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
