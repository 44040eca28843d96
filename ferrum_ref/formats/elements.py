"""The element types of weight files by safetensors' names, and the numpy types that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
MAX_DIMENSIONS: Final = 32

ELEMENTS: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U4": np.dtype(ml_dtypes.uint4),
        "I4": np.dtype(ml_dtypes.int4),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
    }
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file describes it: `element` is a key of ELEMENTS or the name of a packed format."""

    name: str
    shape: tuple[int, ...]
    element: str
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def is_sound_shape(shape: Sequence[int]) -> bool:
    """At most MAX_DIMENSIONS sizes whose product, zeros apart, an array can have at all.  Pure."""
    return len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0 and math.prod(max(1, s) for s in shape) < 2**56


def stored_bytes(element: str, num_elements: int) -> int:
    """Bytes that packed little-endian storage takes; two 4-bit elements share a byte."""
    return (num_elements + 1) // 2 if element in ("U4", "I4") else num_elements * ELEMENTS[element].itemsize


def unpacked(raw: NDArray[np.uint8], element: str, shape: Sequence[int]) -> Array:
    """Little-endian bytes as an array; 4-bit elements lie low nibble first.  Pure; may share memory with `raw`."""
    if element in ("U4", "I4"):
        nibbles = np.stack([raw & 0x0F, raw >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
        if element == "I4":
            nibbles = (nibbles.astype(np.int8) ^ 8) - 8
        return nibbles.astype(ELEMENTS[element]).reshape(shape)
    if element == "BOOL":
        return np.not_equal(raw, 0).reshape(shape)
    return raw.view(ELEMENTS[element]).reshape(shape)
