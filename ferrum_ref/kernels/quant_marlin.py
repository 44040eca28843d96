"""Repacking 4-bit GPTQ weights into Marlin's order: the order in which a warp's tensor-core fragments want them.

The matrix (K, N) is cut in tiles of 16 x 16. Four neighbouring tiles of a row of tiles make one run of 1024 elements,
which the 32 lanes of a warp take in turn, 32 elements each (8 of each tile). In a tile, lane l holds column l // 4 and
column l // 4 + 8, in each the rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 with t = l % 4 (the m16n8k16 fragment).
Eight elements share a 32-bit word; word position i takes element (0, 2, 4, 6, 1, 3, 5, 7)[i] of them, so that
two 16-bit pairs come out of one word with a mask and a shift.

Source: Frantar et al. 2024, section 4; PTX ISA, mma.m16n8k16 fragments.  Clauses: QT-MARLIN-1..3 (specs/quant.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ShapeError
from ferrum_ref.kernels.quant_awq import NIBBLE_ORDER
from ferrum_ref.kernels.quant_words import pack_words, unpack_words

Quanta = NDArray[np.uint8]


def run_order() -> NDArray[np.int64]:
    """Position in a row-major 16 x 64 strip's four consecutive tiles (tile by tile) of each of the 1024 run elements.

    Pure.  [QT-MARLIN-1]
    """
    lane, tile, half, step = np.meshgrid(np.arange(32), np.arange(4), np.arange(2), np.arange(4), indexing="ij")
    row = 2 * (lane % 4) + step % 2 + 8 * (step // 2)
    column = lane // 4 + 8 * half
    order: NDArray[np.int64] = (256 * tile + 16 * row + column).reshape(-1, 8)[:, list(NIBBLE_ORDER)].reshape(-1)
    return order


def repack_marlin(quanta: Quanta) -> NDArray[np.int32]:
    """(K, N) nibbles -> (K / 16, N * 2) int32 words in Marlin's order.  Pure.  [QT-MARLIN-1]

    Raises ShapeError unless K is a multiple of 16 and N of 64.
    """
    num_inputs, num_outputs = _checked("repack_marlin", quanta.shape)
    tiles = quanta.reshape(num_inputs // 16, 16, num_outputs // 16, 16).transpose(0, 2, 1, 3)
    runs = tiles.reshape(-1, 1024)[:, run_order()]
    return pack_words(runs.reshape(num_inputs // 16, num_outputs * 16), 4, 1)


def unpack_marlin(words: NDArray[np.int32]) -> Quanta:
    """The inverse of `repack_marlin`.  Pure.  [QT-MARLIN-2]"""
    num_inputs, num_outputs = _checked("unpack_marlin", (words.shape[0] * 16, words.shape[1] // 2))
    runs = unpack_words(words, 4, num_outputs * 16, axis=1).reshape(-1, 1024)
    tiles = np.empty_like(runs)
    tiles[:, run_order()] = runs
    strips = tiles.reshape(num_inputs // 16, num_outputs // 16, 16, 16).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(strips).reshape(num_inputs, num_outputs)


def repack_marlin_scales(scales: NDArray[Any]) -> NDArray[Any]:
    """(groups, N) scales in the order a thread reads them: by 64 columns with several groups, by 32 with one.  Pure.

    Grouped: column 8 j + i of 64 goes to place 8 i + j.  One group: place 8 i + (2 * m + b) takes column 2 i + 8 m + b.
    Raises ShapeError unless N is a multiple of 64.  [QT-MARLIN-3]
    """
    _checked("repack_marlin_scales", (16, scales.shape[1]))
    if scales.shape[0] > 1:
        return scales.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(scales.shape)
    return scales.reshape(-1, 4, 4, 2).transpose(0, 2, 1, 3).reshape(scales.shape)


def _checked(operation: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[0] % 16 or shape[1] % 64:
        raise ShapeError(f"{operation}: got {list(shape)}, expected (K, N) with K a multiple of 16 and N of 64")
    return shape[0], shape[1]
