"""How matrix kernels read one weight: dense, or out of ggml's blocks of 32, whose words are read as they lie.

A weight matrix comes as `words` and `scales`, two views of the same bytes for packed ones: uint16 words and float16
scales. A Q4_0 block is 9 words, its scale first; byte i of the rest holds weight i below and 16 + i above, each minus
8. A Q8_0 block is 17 words, its scale first; the rest are int8.   Clause: BK-NCUDA-14 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import device
from ferrum_numba.gpu.storage import STORAGES, Storage

BLOCK = 32
Q4_WORDS, Q8_WORDS = 9, 17


@device
def signed(byte: int) -> int:
    """The int8 with these 8 bits."""
    return (byte ^ 128) - 128


@device
def q4_weight(words: Any, scales: Any, row: int, column: int, num_columns: int) -> Any:
    block = (row * num_columns + column) // BLOCK
    place = column % BLOCK
    word = int(words[block * Q4_WORDS + 1 + place % 16 // 2])
    shift = place % 2 * 8 + place // 16 * 4
    return np.float32(scales[block * Q4_WORDS]) * np.float32((word >> shift & 15) - 8)


@device
def q8_weight(words: Any, scales: Any, row: int, column: int, num_columns: int) -> Any:
    block = (row * num_columns + column) // BLOCK
    place = column % BLOCK
    word = int(words[block * Q8_WORDS + 1 + place // 2])
    return np.float32(scales[block * Q8_WORDS]) * np.float32(signed(word >> place % 2 * 8 & 255))


@dataclass(frozen=True, slots=True)
class Weights:
    """A weight format: numba's names of its two arrays, `weight(words, scales, row, column, num_columns)`, and the
    element type of dense weights."""

    name: str
    words: str
    scales: str
    weight: Callable[..., Any]
    storage: Storage | None = None


def dense(storage: Storage) -> Weights:
    """A matrix of floats; its `scales` are not read."""
    load = storage.load

    @device
    def weight(words: Any, scales: Any, row: int, column: int, num_columns: int) -> Any:
        return load(words, row * num_columns + column)

    return Weights(str(storage.data_type), storage.array, storage.array, weight, storage)


DENSE: Mapping[Storage, Weights] = MappingProxyType({storage: dense(storage) for storage in STORAGES.values()})
Q4_0 = Weights("q4_0", "uint16[::1]", "float16[::1]", q4_weight)
Q8_0 = Weights("q8_0", "uint16[::1]", "float16[::1]", q8_weight)
