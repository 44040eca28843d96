"""Sums and dot products in different orders, in float32, and the one rounding to the storage type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ferrum_ref.kernels.rounding import round_to
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

F32 = np.float32
Dot = Callable[[Array, Array], Array]
Total = Callable[[Array], Array]
Kernel = Callable[[Inputs], tuple[Array, ...]]


def wide(inputs: Inputs, *names: str) -> list[Array]:
    """The named arrays in float32."""
    return [inputs.arrays[name].astype(F32) for name in names]


def stored(inputs: Inputs, *results: Array) -> tuple[Array, ...]:
    """The results rounded once to the storage type."""
    return tuple(np.array(round_to(result, inputs.storage.numpy_dtype)) for result in results)


# Dot products a (..., M, K) @ b (..., K, N), five orders of summation -------------------------------------------------


def dot_blas(a: Array, b: Array) -> Array:
    return np.asarray(np.matmul(a, b))


def dot_sequential(a: Array, b: Array) -> Array:
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype=a.dtype)
    for k in range(a.shape[-1]):
        total = total + a[..., :, k, None] * b[..., None, k, :]
    return total


def dot_pairwise(a: Array, b: Array) -> Array:
    return np.asarray(
        np.add.reduce(np.ascontiguousarray(a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :]), axis=-1)
    )


def dot_split(a: Array, b: Array, step: int = 16) -> Array:
    parts = [a[..., k : k + step] @ b[..., k : k + step, :] for k in range(0, a.shape[-1], step)]
    return sum(parts[1:], parts[0]) if parts else dot_blas(a, b)


def dot_lanes(a: Array, b: Array, lanes: int = 16) -> Array:
    """Term k goes to running sum k % lanes; these are joined one after the other."""
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype=a.dtype)
    for lane in range(min(lanes, a.shape[-1])):
        total = total + dot_sequential(a[..., lane::lanes], b[..., lane::lanes, :])
    return total


def dot_backwards(a: Array, b: Array) -> Array:
    return dot_sequential(a[..., ::-1], b[..., ::-1, :])


def dot_compensated(a: Array, b: Array) -> Array:
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype=a.dtype)
    lost = np.zeros_like(total)
    for k in range(a.shape[-1]):
        term = a[..., :, k, None] * b[..., None, k, :] - lost
        following = total + term
        lost = (following - total) - term
        total = following
    return total


DOTS: Mapping[str, Dot] = MappingProxyType(
    {
        "blas": dot_blas,
        "sequential": dot_sequential,
        "pairwise": dot_pairwise,
        "split": dot_split,
        "backwards": dot_backwards,
        "compensated": dot_compensated,
    }
)


def total_sequential(x: Array) -> Array:
    total = np.zeros((*x.shape[:-1], 1), dtype=x.dtype)
    for k in range(x.shape[-1]):
        total = total + x[..., k : k + 1]
    return total


def total_pairwise(x: Array) -> Array:
    return np.asarray(np.add.reduce(np.ascontiguousarray(x), axis=-1, keepdims=True))


def total_lanes(x: Array, lanes: int = 8) -> Array:
    """Eight running sums side by side, as a vector unit keeps them."""
    whole = x.shape[-1] // lanes * lanes
    parts = x[..., :whole].reshape(*x.shape[:-1], whole // lanes, lanes)
    partial = np.zeros((*x.shape[:-1], lanes), dtype=x.dtype)
    for k in range(parts.shape[-2]):
        partial = partial + parts[..., k, :]
    return total_sequential(np.concatenate([partial, x[..., whole:]], axis=-1))


def total_double(x: Array) -> Array:
    return np.asarray(x.astype(np.float64).sum(axis=-1, keepdims=True).astype(F32))


TOTALS: Mapping[str, Total] = MappingProxyType(
    {
        "sequential": total_sequential,
        "pairwise": total_pairwise,
        "lanes": total_lanes,
        "double": total_double,
    }
)
