"""Random stored arrays, and views of them that are not contiguous."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.units import Array, Storage


def normal(rng: np.random.Generator, shape: tuple[int, ...], storage: Storage, scale: float = 1.0) -> Array:
    """Independent normal values, stored."""
    return storage.round(rng.standard_normal(shape) * scale)


def uniform(rng: np.random.Generator, shape: tuple[int, ...], storage: Storage, low: float, high: float) -> Array:
    """Independent uniform values, stored."""
    return storage.round(rng.uniform(low, high, shape))


def gain(rng: np.random.Generator, size: int, storage: Storage) -> Array:
    """The weight of a norm: around one, stored."""
    return storage.round(1.0 + 0.25 * rng.standard_normal((size,)))


def filled(shape: tuple[int, ...], value: float, storage: Storage) -> Array:
    """A constant array, stored."""
    return storage.round(np.full(shape, value, dtype=np.float64))


def strided(array: Array, gap: float = np.nan) -> Array:
    """The same values as a view with a stride of two on the last axis; the elements between are `gap`."""
    holder = np.full((*array.shape[:-1], 2 * array.shape[-1]), gap).astype(array.dtype)
    view = holder[..., ::2]
    view[...] = array
    return view


def swapped(array: Array, first: int, second: int) -> Array:
    """The same values stored in the order of two axes swapped: a transposed view."""
    return np.ascontiguousarray(np.swapaxes(array, first, second)).swapaxes(first, second)
