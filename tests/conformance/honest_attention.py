"""Attention in different schedules: whole, online, split over keys; contiguous and paged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from honest_sums import F32, Array, dot_blas, dot_sequential, stored, wide

from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.paged import slots_of


def seen(num_tokens: int, num_keys: int, params: Any) -> Array:
    own = num_keys - num_tokens + np.arange(num_tokens)[:, None]
    keys = np.arange(num_keys)[None, :]
    if not params.causal:
        return np.ones((num_tokens, num_keys), dtype=bool)
    return (keys <= own) & (keys > own - (params.sliding_window or num_keys + 1))


def heads(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """(H, T, D), (H, S, D), (H, S, D): keys and values repeated for their query heads."""
    group = q.shape[1] // k.shape[1]
    return q.swapaxes(0, 1), np.repeat(k.swapaxes(0, 1), group, axis=0), np.repeat(v.swapaxes(0, 1), group, axis=0)


def attend_whole(q: Array, k: Array, v: Array, visible: Array, scale: float, form: str, dtype: Any) -> Array:
    """All scores at once. form: plain | scaled q | normalised first | rounded P | sequential | exp2."""
    dot = dot_sequential if form == "sequential" else dot_blas
    if form == "scaled q":
        scores = dot(q * F32(scale), k.swapaxes(1, 2))
    else:
        scores = dot(q, k.swapaxes(1, 2)) * F32(scale)
    if not k.shape[1]:
        return np.zeros(q.shape, dtype=F32)
    scores = np.where(visible, scores, -np.inf)
    empty = ~visible.any(axis=-1)[None, :, None]
    top = np.where(empty, F32(0.0), scores.max(axis=-1, keepdims=True))
    exponent = scores - top
    weights = np.exp2(exponent * F32(np.log2(np.e))) if form == "exp2" else np.exp(exponent)
    total = np.where(empty, F32(1.0), weights.sum(axis=-1, keepdims=True, dtype=F32))
    if form == "normalised first":
        return dot(weights / total, v)
    if form == "rounded P":
        weights = weights.astype(dtype).astype(F32)
    return dot(weights, v) / total


def attend_online(q: Array, k: Array, v: Array, visible: Array, scale: float, block: int) -> Array:
    """Keys `block` at a time with a running maximum."""
    top = np.full((*q.shape[:2], 1), -np.inf, dtype=F32)
    total = np.zeros((*q.shape[:2], 1), dtype=F32)
    mixed = np.zeros(q.shape, dtype=F32)
    for start in range(0, k.shape[1], block):
        piece = slice(start, start + block)
        scores = np.where(visible[:, piece], q @ k[:, piece].swapaxes(1, 2) * F32(scale), -np.inf)
        higher = np.maximum(top, scores.max(axis=-1, keepdims=True))
        level = np.where(np.isfinite(higher), higher, F32(0.0))
        weights, rescale = np.exp(scores - level), np.exp(top - level)
        total = total * rescale + weights.sum(axis=-1, keepdims=True, dtype=F32)
        mixed = mixed * rescale + weights @ v[:, piece]
        top = higher
    return np.where(total > 0, mixed / np.where(total > 0, total, F32(1.0)), F32(0.0))


def attend_split(q: Array, k: Array, v: Array, visible: Array, scale: float, block: int) -> Array:
    """Every block of keys on its own, combined by their maxima and sums at the end."""
    parts = []
    for start in range(0, k.shape[1], block):
        piece = slice(start, start + block)
        scores = np.where(visible[:, piece], q @ k[:, piece].swapaxes(1, 2) * F32(scale), -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, F32(0.0)))
        parts.append((top, weights.sum(axis=-1, keepdims=True, dtype=F32), weights @ v[:, piece]))
    if not parts:
        return np.zeros(q.shape, dtype=F32)
    highest = np.max([top for top, _, _ in parts], axis=0)
    level = np.where(np.isfinite(highest), highest, F32(0.0))
    factors = [np.exp(top - level) for top, _, _ in parts]
    total = sum((factor * part[1] for factor, part in zip(factors, parts)), np.zeros_like(level))
    mixed = sum((factor * part[2] for factor, part in zip(factors, parts)), np.zeros(q.shape, dtype=F32))
    return np.where(total > 0, mixed / np.where(total > 0, total, F32(1.0)), F32(0.0))


def attend(q: Array, k: Array, v: Array, params: Any, form: str, dtype: Any, block: int) -> Array:
    visible = seen(q.shape[0], k.shape[0], params)
    arguments = (*heads(q, k, v), visible, params.softmax_scale)
    if form == "online":
        mixed = attend_online(*arguments, block)
    elif form == "split":
        mixed = attend_split(*arguments, block)
    else:
        mixed = attend_whole(*arguments, form, dtype)
    return mixed.swapaxes(0, 1)


def attention(form: str, block: int = 16) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        q, k, v = wide(inputs, "q", "k", "v")
        dtype, params = inputs.storage.numpy_dtype, inputs.settings["params"]
        out = np.zeros(q.shape, dtype=F32)
        for batch in range(q.shape[0]):
            out[batch] = attend(q[batch], k[batch], v[batch], params, form, dtype, block)
        return stored(inputs, out)

    return run


def gathered(inputs: Inputs) -> tuple[Array, list[tuple[Array, Array]]]:
    """Queries (B, T, H, D), and each sequence's keys and values in order of position."""
    q, k_cache, v_cache = wide(inputs, "q", "k_cache", "v_cache")
    pairs = []
    for row, length in zip(inputs.settings["table"], inputs.settings["lens"], strict=True):
        slots = slots_of(row, int(length), k_cache.shape[1])
        pairs.append(tuple(cache.reshape(-1, *cache.shape[2:])[slots] for cache in (k_cache, v_cache)))
    return (q if q.ndim == 4 else q[:, None]), pairs


def paged_attention(form: str, block: int | None = None) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        queries, pairs = gathered(inputs)
        dtype, params = inputs.storage.numpy_dtype, inputs.settings["params"]
        step = block or inputs.case.sizes["block"]
        out = np.zeros(queries.shape, dtype=F32)
        for batch, (k, v) in enumerate(pairs):
            out[batch] = attend(queries[batch], k, v, params, form, dtype, step)
        return stored(inputs, out.reshape(inputs.arrays["q"].shape))

    return run
