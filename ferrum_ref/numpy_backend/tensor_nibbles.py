"""Arrays of 4-bit elements, two to a byte, and views of them.   Clauses: TN-PACKED-1..5.

Element 2i is the low nibble of byte i, element 2i + 1 the high one. A view is a shape, strides and an offset, all in
elements, so it may start at an odd one.  Source: ONNX, "4 bit integer types", for the order of the nibbles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError

Bytes = NDArray[np.uint8]
Indices = NDArray[np.intp]


def num_bytes(num_elements: int) -> int:
    """ceil(n / 2): the bytes that n packed elements take. Pure."""
    return (num_elements + 1) // 2


@dataclass(frozen=True, slots=True)
class Nibbles:
    """Some elements of a packed storage. `write` mutates the storage; everything else is pure."""

    storage: Bytes
    num_stored: int  # elements of the storage: its last byte may be half padding
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def over(storage: Bytes, shape: tuple[int, ...]) -> Nibbles:
        """All of a storage in row-major order."""
        return Nibbles(storage, math.prod(shape), shape, _row_major(shape))

    @staticmethod
    def packed(values: Bytes) -> Nibbles:
        """A new storage that holds the values, one byte each on entry; only the low four bits count."""
        flat = values.reshape(-1)
        storage = np.zeros(num_bytes(flat.size), np.uint8)
        np.bitwise_and(flat[0::2], 15, out=storage)
        storage[: flat.size // 2] |= flat[1::2] << 4
        return Nibbles.over(storage, values.shape)

    def is_contiguous(self) -> bool:
        return self._ghost().flags.c_contiguous

    def bytes_in_place(self) -> Bytes | None:
        """The bytes of exactly these elements, in order; None unless contiguous and filling whole bytes.

        An odd last element may share its byte with nothing but the padding at the end of the storage.
        """
        size = math.prod(self.shape)
        if not self.is_contiguous() or self.offset % 2:
            return None
        if size % 2 and self.offset + size != self.num_stored:
            return None
        first = self.offset // 2
        return self.storage[first : first + num_bytes(size)]

    def read(self) -> Bytes:
        """The elements, one byte each, as a new array of this shape."""
        if not self.is_contiguous():
            index = self.indices()
            picked: Bytes = (self.storage[index >> 1] >> ((index & 1) << 2).astype(np.uint8)) & np.uint8(15)
            return picked
        size, first = math.prod(self.shape), self.offset // 2
        pairs = self.storage[first : first + num_bytes(self.offset % 2 + size)]
        out = np.empty(2 * pairs.size, np.uint8)
        np.bitwise_and(pairs, 15, out=out[0::2])
        np.right_shift(pairs, 4, out=out[1::2])
        return out[self.offset % 2 :][:size].reshape(self.shape)

    def write(self, values: Bytes) -> None:
        """Store values of this shape, one byte each; the neighbours in shared bytes keep theirs.

        Raises BackendError for storage that may not be written.
        """
        if not self.storage.flags.writeable:
            raise BackendError("4-bit tensor: its memory may not be written; copy it with from_tensor")
        index, flat = self.indices().reshape(-1), values.reshape(-1) & np.uint8(15)
        for parity, keep, shift in ((0, 0xF0, 0), (1, 0x0F, 4)):
            here = (index & 1) == parity
            places = index[here] >> 1
            self.storage[places] = (self.storage[places] & np.uint8(keep)) | (flat[here] << shift)

    def indices(self) -> Indices:
        """The number of each element in the storage; shape as this."""
        index: Indices = np.full((), self.offset, np.intp)
        for dim, stride in zip(self.shape, self.strides, strict=True):
            index = index[..., None] + np.arange(dim) * stride
        return index

    def box(self, start: tuple[int, ...], end: tuple[int, ...]) -> Nibbles:
        """The part start[i]:end[i] of every axis, sharing the storage."""
        shape = tuple(high - low for low, high in zip(start, end, strict=True))
        offset = self.offset + sum(low * stride for low, stride in zip(start, self.strides, strict=True))
        return self._part(shape, self.strides, offset if math.prod(shape) else 0)

    def permuted(self, dims: tuple[int, ...]) -> Nibbles:
        """The axes in another order, sharing the storage."""
        shape, strides = tuple(self.shape[dim] for dim in dims), tuple(self.strides[dim] for dim in dims)
        return self._part(shape, strides, self.offset)

    def picked(self, dim: int, index: int) -> Nibbles:
        """One index of axis `dim`, the axis removed, sharing the storage."""
        shape, strides = _without(self.shape, dim), _without(self.strides, dim)
        return self._part(shape, strides, self.offset + index * self.strides[dim])

    def reshaped(self, shape: tuple[int, ...]) -> Nibbles | None:
        """The same elements in row-major order under another shape of as many; None where that needs a copy."""
        try:
            strides = self._ghost().reshape(shape, copy=False).strides
        except ValueError:
            return None
        return self._part(shape, strides, self.offset)

    def shares_memory_with(self, other: Nibbles) -> bool:
        """True when some element is in both."""
        if not np.may_share_memory(self.storage, other.storage):
            return False
        return bool(np.intersect1d(_addresses(self), _addresses(other)).size)

    def _part(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Nibbles:
        return Nibbles(self.storage, self.num_stored, shape, strides, offset)

    def _ghost(self) -> Bytes:
        """An array of this layout that is never read: numpy's own rules then say what a layout allows."""
        return as_strided(np.empty(1, np.uint8), self.shape, self.strides, writeable=False)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for dim in reversed(shape):
        strides.append(step)
        step *= dim
    return tuple(reversed(strides))


def _addresses(nibbles: Nibbles) -> Indices:
    base: int = nibbles.storage.__array_interface__["data"][0]
    return nibbles.indices() + 2 * base


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return values[:dim] + values[dim + 1 :]
