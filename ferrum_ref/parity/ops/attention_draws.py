"""Queries, keys and values that show where an attention kernel goes wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.parity.ops import draws
from ferrum_ref.parity.units import Array, Storage

LOW_SCORE = 2e4  # below -10,000, which stands for minus infinity in many a mask
NEEDLE_SCORE = 40.0  # exp(-40): every other key together is far below a storage type's unit


def needle(
    rng: np.random.Generator,
    q: Array,
    k: Array,
    v: Array,
    place: int,
    scale: float,
    page: int = 1,
    head: int | None = None,
) -> tuple[Array, Array, Array]:
    """One key, or a page of `page` keys, carries the answer: queries share its direction, its value is far off.

    q (..., D), k and v (S, G, D), float64. The needle's score is NEEDLE_SCORE, the others are about zero. With `head`,
    only that kv head has a needle, and every other one has it where the first key lies.
    """
    size = q.shape[-1]
    direction = rng.choice([-1.0, 1.0], size)
    strength = (NEEDLE_SCORE / (scale * size)) ** 0.5
    q = np.broadcast_to(direction * strength, q.shape) + 0.01 * q
    k, v = 0.01 * k, 0.1 * v
    where = slice(place, place + page)
    answer = 4.0 + rng.standard_normal((v[where].shape[0], *v.shape[1:]))
    if head is None:
        k[where], v[where] = direction * strength, answer
        return q, k, v
    others = np.arange(k.shape[1]) != head
    k[where, head], v[where, head] = direction * strength, answer[:, head]
    k[0, others], v[0, others] = direction * strength, -answer[0, others]
    return q, k, v


def one_hot_values(v: Array) -> Array:
    """v_j = e_(j mod D): every output element is the sum of the probabilities of the keys with that remainder."""
    num_keys, _, size = v.shape
    v = np.zeros_like(v)
    v[np.arange(num_keys), :, np.arange(num_keys) % size] = 1.0
    return v


def probed(
    probe: str,
    rng: np.random.Generator,
    shapes: Sequence[tuple[int, ...]],
    scale: float,
    place: int | None,
    page: int = 1,
) -> tuple[Array, Array, Array]:
    """q (T, H, D), k and v (S, G, D) of one sequence, float64, not stored yet."""
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    if probe.startswith("needle") and k.shape[0]:
        head = int(rng.integers(k.shape[1])) if probe == "needle in one head" else None
        where = k.shape[0] - 1 if place is None else min(place, k.shape[0] - 1)
        return needle(rng, q, k, v, where, scale, page, head)
    if probe == "one-hot V":
        return q, k, one_hot_values(v)
    if probe == "large scores":
        return 6.0 * q, 3.0 * k, v
    if probe == "huge scores":  # beyond the range of exp unless the maximum is taken off
        return 20.0 * q, 10.0 * k, v
    if probe == "low scores":  # every score lies far below what stands for a masked one, or a maximum of nothing
        signs = (LOW_SCORE / (scale * q.shape[-1])) ** 0.5 * rng.choice([-1.0, 1.0], q.shape[-1])
        spread = 1.0 + 1e-4 * rng.standard_normal((*k.shape[:2], 1))
        return signs + 0.01 * q, -signs * spread + 0.01 * k, v
    if probe == "equal keys":
        return q, np.broadcast_to(k[:1], k.shape).copy(), v
    if probe == "rising scores":  # the running maximum of an online softmax moves at every key
        direction: Array = rng.standard_normal((q.shape[-1],))
        rise = np.linspace(0.0, 12.0, k.shape[0])[:, None, None]
        unit = direction / (scale * float(direction @ direction))
        return np.broadcast_to(direction, q.shape) + 0.1 * q, rise * unit + 0.1 * k, v
    return q, k, v


def stored(storage: Storage, arrays: Sequence[Array], layout: str) -> list[Array]:
    """The three arrays as stored; some cases see them as strided or transposed views."""
    rounded = [storage.round(array) for array in arrays]
    if layout == "strided":
        return [draws.strided(array) for array in rounded]
    if layout == "head-major":
        return [draws.swapped(array, 1, 2) for array in rounded]
    return rounded
