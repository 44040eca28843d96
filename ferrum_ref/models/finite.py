"""Weights that are no numbers.  Clause: MD-CKPT-7 (specs/model_files.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidFormatError

_FLOAT16_EXPONENT = 0x7C00
_BFLOAT16_EXPONENT = 0x7F80
_CHUNK_ELEMENTS = 1 << 20


def require_finite(name: str, values: npt.NDArray[Any]) -> None:
    """Raises InvalidFormatError, naming the tensor and the first bad element, for a NaN or an infinity.  [MD-CKPT-7]

    values: any float type; read once, a few megabytes at a time. Pure.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        part = flat[start : start + _CHUNK_ELEMENTS]
        if part.dtype == np.float32:
            # One product instead of a test of each: only what is not finite, or very large, needs the second look.
            with np.errstate(all="ignore"):
                if np.isfinite(np.dot(part, part)):
                    continue
        bad = ~_finite(part)
        if bad.any():
            at = start + int(bad.argmax())
            place = [int(index) for index in np.unravel_index(at, values.shape)]
            count = sum(
                int((~_finite(flat[each : each + _CHUNK_ELEMENTS])).sum())
                for each in range(start, flat.size, _CHUNK_ELEMENTS)
            )
            raise InvalidFormatError(
                f"read tensor {name}: got {count} of {flat.size} elements that are not finite (the first is "
                f"{float(flat[at])} at {place} of {list(values.shape)}), expected finite {values.dtype.name} numbers"
            )


def _finite(part: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if part.dtype.itemsize == 2:
        mask = _BFLOAT16_EXPONENT if part.dtype.name == "bfloat16" else _FLOAT16_EXPONENT
        found: npt.NDArray[np.bool_] = (part.view(np.uint16) & np.uint16(mask)) != mask
        return found
    return np.asarray(np.isfinite(part), dtype=np.bool_)
