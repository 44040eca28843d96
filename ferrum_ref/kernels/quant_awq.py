"""AWQ weights ("gemm" layout): 4-bit integers packed along the output axis in an interleaved order.

    W[n, k] = (q[k, n] - z[k // group_size, n]) * s[k // group_size, n]

    qweight (K, N / 8) int32; nibble i of a word is output 8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  (K / group_size, N / 8) int32, the same order, zero points as they are; scales (K / group_size, N) float

Source: Lin et al. 2023; AutoAWQ's WQLinear_GEMM storage.  Clauses: QT-AWQ-1..2 (specs/quant.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.kernels.quant_words import pack_words, unpack_words

Float32 = NDArray[np.float32]
NIBBLE_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class AwqWeights:
    """The three tensors of one linear layer as they are stored; `group_size` -1 is one group."""

    qweight: NDArray[np.int32]
    qzeros: NDArray[np.int32]
    scales: NDArray[Any]
    group_size: int
    bits: int = 4


def decode_awq(weights: AwqWeights) -> Float32:
    """W (N, K) float32, PyTorch's orientation.  Pure.  [QT-AWQ-1]

    Raises UnsupportedError for bits other than 4; ShapeError when the tensors do not fit each other.
    """
    if weights.bits != 4:
        raise UnsupportedError(f"decode_awq: bits: got {weights.bits}, expected 4, the only width of the format")
    num_inputs, num_words = weights.qweight.shape
    size = _group_size(weights.group_size, num_inputs)
    expected = (num_inputs // size, num_words * 8)
    if weights.scales.shape != expected or weights.qzeros.shape != (expected[0], num_words):
        raise ShapeError(
            f"decode_awq: scales {list(weights.scales.shape)} and qzeros {list(weights.qzeros.shape)}: "
            f"expected {list(expected)} and {[expected[0], num_words]} for qweight {list(weights.qweight.shape)}"
        )
    quanta, zeros = _in_order(weights.qweight), _in_order(weights.qzeros)
    groups = np.arange(num_inputs) // size
    levels = quanta.astype(np.int16) - zeros.astype(np.int16)[groups]
    values: Float32 = levels.astype(np.float32) * weights.scales.astype(np.float32)[groups]
    return np.ascontiguousarray(values.T)


def pack_awq(quanta: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(rows, N) nibbles in output order -> (rows, N / 8) int32 words in AWQ's order.  Pure.  [QT-AWQ-2]

    Raises ShapeError unless N is a multiple of 8.
    """
    if quanta.ndim != 2 or quanta.shape[1] % 8:
        raise ShapeError(f"pack_awq: quanta: got {list(quanta.shape)}, expected (rows, a multiple of 8)")
    words = quanta.reshape(len(quanta), -1, 8)[:, :, list(NIBBLE_ORDER)]
    return pack_words(words.reshape(quanta.shape), 4, 1)


def _in_order(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    nibbles = unpack_words(words, 4, words.shape[1] * 8, axis=1).reshape(len(words), -1, 8)
    quanta = np.empty_like(nibbles)
    quanta[:, :, list(NIBBLE_ORDER)] = nibbles
    return quanta.reshape(len(words), -1)


def _group_size(group_size: int, num_inputs: int) -> int:
    size = num_inputs if group_size == -1 else group_size
    if size < 1 or num_inputs % size:
        raise InvalidParameterError(
            f"decode_awq: group_size: got {group_size}, expected -1 or a divisor of {num_inputs}"
        )
    return size
