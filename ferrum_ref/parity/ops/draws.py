"""Random stored arrays, and views of them that are not contiguous."""

from __future__ import annotations

import math

import numpy as np

from ferrum_ref.parity.units import Array, Storage

MAX_ELEMENTS = 4096  # of an array whose shape is drawn: cases must stay cheap


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


def part_of_rows(array: Array) -> Array:
    """The same values as the middle third of longer rows, as of a fused projection; NaN stands on both sides."""
    size = array.shape[-1]
    holder = np.full((*array.shape[:-1], 3 * size), np.nan).astype(array.dtype)
    view = holder[..., size : 2 * size]
    view[...] = array
    return view


def laid_out(array: Array, probe: str) -> Array:
    """`array` in the layout that its probe names: "strided", "packed" (`part_of_rows`), else as it is."""
    if probe == "strided":
        return strided(array)
    return part_of_rows(array) if probe == "packed" else array


def swapped(array: Array, first: int, second: int) -> Array:
    """The same values stored in the order of two axes swapped: a transposed view."""
    return np.ascontiguousarray(np.swapaxes(array, first, second)).swapaxes(first, second)


def shape(rng: np.random.Generator, max_rank: int, max_size: int) -> tuple[int, ...]:
    """A random shape of rank 1 to `max_rank`; sizes are as often tiny as large."""
    rank = int(rng.integers(1, max_rank + 1))
    sizes = [size(rng, max_size) for _ in range(rank)]
    while math.prod(sizes) > MAX_ELEMENTS:
        sizes[sizes.index(max(sizes))] //= 2
    return tuple(sizes)


def size(rng: np.random.Generator, max_size: int) -> int:
    """A random size in [1, max_size], its logarithm uniform: small sizes and those off every tile are frequent."""
    return min(max_size, int(np.exp(rng.uniform(0.0, np.log(max_size + 1.0)))))
