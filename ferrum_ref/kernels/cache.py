"""Writing new keys and values into their cache.   Clauses: KN-WRITEKV-1..3."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.kernels.integers import as_integers
from ferrum_ref.kernels.rounding import Array


def write_kv(cache: Array, rows: Array, slots: Sequence[int] | Array) -> None:
    """cache[slots[t]] = rows[t], cache seen as (N, G, D)          [KN-WRITEKV-1..3]

    cache (N, G, D) or (..., G, D) with its leading axes contiguous; rows (T, G, D) of the same element type; slots T
    ints. Mutates cache. A negative slot skips its row; of equal slots the last row stays.
    Raises, before anything is written: ShapeError for other shapes or a cache that cannot be seen as (N, G, D);
    BackendError for another element type or a slot of N or more.
    """
    index = as_integers("write_kv", "slots", slots)
    if rows.ndim != 3 or cache.ndim < 3 or cache.shape[-2:] != rows.shape[1:] or rows.shape[0] != index.size:
        raise ShapeError(
            f"write_kv: cache {cache.shape}, rows {rows.shape}, {index.size} slots; "
            "expected (..., G, D), (T, G, D) and T slots"
        )
    if cache.dtype != rows.dtype:
        raise BackendError(f"write_kv: cache {cache.dtype}, rows {rows.dtype}, expected one element type")
    if not index.size:
        return
    target = _as_slots(cache)
    low, high = int(index.min()), int(index.max())
    if high >= target.shape[0]:
        raise BackendError(f"write_kv: slot {high}, expected less than {target.shape[0]}, the slots of the cache")
    if index.size == 1:
        if low >= 0:
            target[low] = rows[0]
    elif low < 0:
        kept = index >= 0
        target[index[kept]] = rows[kept]
    elif high - low == index.size - 1 and bool((index[1:] > index[:-1]).all()):
        target[low : high + 1] = rows
    else:
        target[index] = rows


def _as_slots(cache: Array) -> Array:
    if cache.ndim == 3:
        return cache
    try:
        return cache.reshape((-1, *cache.shape[-2:]), copy=False)
    except ValueError:
        raise ShapeError(
            f"write_kv: cache {cache.shape} with strides {cache.strides} cannot be written as one run of slots; "
            "pass a contiguous cache"
        ) from None
