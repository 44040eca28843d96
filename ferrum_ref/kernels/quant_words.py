"""Integers of 2 to 8 bits in 32-bit words: one continuous stream of bits, lowest first, as GPTQ checkpoints keep them.

    element k occupies bits k * bits … (k + 1) * bits - 1 of the stream; bit p of it is bit p % 32 of word p // 32.

For 2, 4 and 8 bits no element crosses a word; for 3 (and 5, 6, 7) some do: 32 elements fill exactly `bits` words.
Clauses: QT-WORDS-1..2 (specs/quant.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError

Words = NDArray[np.int32]
Quanta = NDArray[np.uint8]


def check_bits(operation: str, bits: int) -> None:
    """Raises InvalidParameterError unless 2 <= bits <= 8."""
    if not 2 <= bits <= 8:
        raise InvalidParameterError(f"{operation}: bits: got {bits}, expected 2 to 8")


def unpack_words(words: Words, bits: int, num_elements: int, axis: int) -> Quanta:
    """The elements packed along `axis`.  words int32 or uint32; the result has num_elements there, uint8.  Pure.

    Raises InvalidParameterError for bits outside 2..8; ShapeError unless the words are ceil(num_elements * bits / 32).
    [QT-WORDS-1]
    """
    check_bits("unpack_words", bits)
    wanted = -(-num_elements * bits // 32)
    if words.shape[axis] != wanted or words.dtype.itemsize != 4:
        raise ShapeError(
            f"unpack_words: words: got {words.dtype}{list(words.shape)}, expected 32-bit words with {wanted} along "
            f"axis {axis} for {num_elements} elements of {bits} bits"
        )
    stream = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype("<i4").view(np.uint8)
    if 8 % bits == 0:  # no element crosses a byte
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (stream[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        found = fields.reshape(*stream.shape[:-1], -1)[..., :num_elements]
        return np.ascontiguousarray(np.moveaxis(found, -1, axis))
    position = np.arange(num_elements) * bits
    first = np.minimum(position // 8, stream.shape[-1] - 1)
    second = np.minimum(first + 1, stream.shape[-1] - 1)
    pair = stream[..., first].astype(np.uint16) | (stream[..., second].astype(np.uint16) << np.uint16(8))
    elements = (pair >> (position % 8).astype(np.uint16)) & np.uint16((1 << bits) - 1)
    return np.ascontiguousarray(np.moveaxis(elements.astype(np.uint8), -1, axis))


def pack_words(elements: Quanta, bits: int, axis: int) -> Words:
    """The inverse of `unpack_words`; unused bits of the last word are 0.  elements below 2**bits.  Pure.

    Raises InvalidParameterError for bits outside 2..8 or an element of 2**bits or more.  [QT-WORDS-1]
    """
    check_bits("pack_words", bits)
    if elements.size and int(elements.max()) >= 1 << bits:
        raise InvalidParameterError(f"pack_words: elements: got {int(elements.max())}, expected below {1 << bits}")
    last = np.moveaxis(elements, axis, -1)
    digits = np.unpackbits(last[..., None], axis=-1, bitorder="little")[..., :bits].reshape(*last.shape[:-1], -1)
    padding = -digits.shape[-1] % 32
    digits = np.pad(digits, [(0, 0)] * (digits.ndim - 1) + [(0, padding)])
    words = np.packbits(digits, axis=-1, bitorder="little").view("<i4")
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).astype(np.int32, copy=False)
