"""Attention in different schedules: whole, online, split over keys; contiguous and paged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.parity.honest.sums import F32, Kernel, dot_blas, dot_sequential, stored, wide
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.paged import slots_of
from ferrum_ref.parity.units import Array


def seen(num_tokens: int, num_keys: int, params: AttentionParams) -> Array:
    """(T, S) bool: what each new token sees."""
    own = num_keys - num_tokens + np.arange(num_tokens)[:, None]
    keys = np.arange(num_keys)[None, :]
    if not params.causal:
        return np.ones((num_tokens, num_keys), dtype=bool)
    return np.asarray((keys <= own) & (keys > own - (params.sliding_window or num_keys + 1)))


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence, heads apart, in float32: q (H, T, D), k and v (H, S, D) repeated for their query heads.

    visible (T, S) or (H, T, S); sinks (H, 1, 1) or None; position: where each key stands, for schedules that care.
    """

    q: Array
    k: Array
    v: Array
    visible: Array
    scale: float
    softcap: float = 0.0
    sinks: Array | None = None

    def scores(self, piece: slice | None = None, form: str = "") -> Array:
        """Capped and masked scores of some keys."""
        dot = dot_sequential if form == "sequential" else dot_blas
        k = self.k if piece is None else self.k[:, piece]
        visible = self.visible if piece is None else self.visible[..., piece]
        if form == "scaled q":
            scores = dot(self.q * F32(self.scale), k.swapaxes(1, 2))
        else:
            scores = dot(self.q, k.swapaxes(1, 2)) * F32(self.scale)
        if self.softcap:
            scores = np.tanh(scores / F32(self.softcap)) * F32(self.softcap)
        return np.where(visible, scores, F32(-np.inf))


def sequence_of(q: Array, k: Array, v: Array, params: AttentionParams, sinks: Array | None = None) -> Sequence:
    """q (T, H, D), k and v (S, G, D), sinks (H,), float32."""
    group = q.shape[1] // k.shape[1]
    beside = None if sinks is None else sinks.reshape(-1, 1, 1)
    keys, values = (np.repeat(part.swapaxes(0, 1), group, axis=0) for part in (k, v))
    visible = seen(q.shape[0], k.shape[0], params)
    return Sequence(q.swapaxes(0, 1), keys, values, visible, params.softmax_scale, params.logit_softcap, beside)


def attend_whole(one: Sequence, form: str = "plain", dtype: Any = None) -> Array:
    """All scores at once. form: plain | scaled q | normalised first | rounded P | sequential | exp2."""
    if not one.k.shape[1]:
        return np.zeros(one.q.shape, dtype=F32)
    dot = dot_sequential if form == "sequential" else dot_blas
    scores = one.scores(form=form)
    top = scores.max(axis=-1, keepdims=True)
    empty = np.isneginf(top)
    if one.sinks is not None:
        top = np.maximum(top, one.sinks)
    top = np.where(np.isneginf(top), F32(0.0), top)
    exponent = scores - top
    weights = np.exp2(exponent * F32(np.log2(np.e))) if form == "exp2" else np.exp(exponent)
    total = weights.sum(axis=-1, keepdims=True, dtype=F32)
    if one.sinks is not None:
        total = total + np.exp(one.sinks - top)
    total = np.where(empty, F32(1.0), total)
    if form == "normalised first":
        return dot(weights / total, one.v)
    if form == "rounded P":
        weights = weights.astype(dtype).astype(F32)
    return np.asarray(dot(weights, one.v) / total)


def pieces(num_keys: int, block: int) -> Iterator[slice]:
    """Consecutive blocks of keys."""
    return (slice(start, start + block) for start in range(0, num_keys, block))


def attend_online(one: Sequence, block: int, rescales: bool = True) -> Array:
    """Keys `block` at a time with a running maximum; the sink comes last."""
    top = np.full((*one.q.shape[:2], 1), -np.inf, dtype=F32)
    total = np.zeros((*one.q.shape[:2], 1), dtype=F32)
    mixed = np.zeros(one.q.shape, dtype=F32)
    for piece in pieces(one.k.shape[1], block):
        scores = one.scores(piece)
        higher = np.maximum(top, scores.max(axis=-1, keepdims=True))
        level = np.where(np.isfinite(higher), higher, F32(0.0))
        weights = np.exp(scores - level)
        rescale = np.exp(top - level) if rescales else F32(1.0)
        total = total * rescale + weights.sum(axis=-1, keepdims=True, dtype=F32)
        mixed = mixed * rescale + weights @ one.v[:, piece]
        top = higher
    return _finished(one, top, total, mixed)


def attend_split(one: Sequence, block: int) -> Array:
    """Every block of keys on its own, combined by their maxima and sums at the end."""
    parts = [part_of(one, piece) for piece in pieces(one.k.shape[1], block)]
    return combined(one, parts)


Part = tuple[Array, Array, Array]


def part_of(one: Sequence, piece: slice) -> Part:
    """Maximum, sum and weighted values of one block of keys."""
    scores = one.scores(piece)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, F32(0.0)))
    return top, weights.sum(axis=-1, keepdims=True, dtype=F32), np.asarray(weights @ one.v[:, piece])


def combined(one: Sequence, parts: list[Part]) -> Array:
    """The blocks' results as one."""
    if not parts:
        return np.zeros(one.q.shape, dtype=F32)
    highest = np.max([top for top, _, _ in parts], axis=0)
    level = np.where(np.isfinite(highest), highest, F32(0.0))
    factors = [np.exp(top - level) for top, _, _ in parts]
    total, mixed = np.zeros_like(level), np.zeros(one.q.shape, dtype=F32)
    for factor, (_, part_total, part_mixed) in zip(factors, parts, strict=True):
        total, mixed = total + factor * part_total, mixed + factor * part_mixed
    return _finished(one, highest, total, mixed)


def _finished(one: Sequence, top: Array, total: Array, mixed: Array) -> Array:
    """The quotient, after the sink joined the sum."""
    if one.sinks is not None:
        higher = np.maximum(top, one.sinks)
        rescale = np.where(np.isfinite(top), np.exp(top - higher), F32(0.0))
        total, mixed = total * rescale + np.exp(one.sinks - higher), mixed * rescale
    return np.where(total > 0, mixed / np.where(total > 0, total, F32(1.0)), F32(0.0))


Attend = Callable[[Sequence], Array]


def schedule(form: str, dtype: Any, block: int) -> Attend:
    """How one sequence is attended."""
    if form == "online":
        return lambda one: attend_online(one, block)
    if form == "split":
        return lambda one: attend_split(one, block)
    return lambda one: attend_whole(one, form, dtype)


def sequences(inputs: Inputs) -> list[Sequence]:
    """Every sequence of a contiguous or a paged case."""
    params = inputs.settings["params"]
    sinks = wide(inputs, "sinks")[0] if "sinks" in inputs.arrays else None
    if "k_cache" in inputs.arrays:
        queries, pairs = gathered(inputs)
        return [sequence_of(q, k, v, params, sinks) for q, (k, v) in zip(queries, pairs, strict=True)]
    return [sequence_of(q, k, v, params, sinks) for q, k, v in zip(*wide(inputs, "q", "k", "v"), strict=True)]


def attended(
    inputs: Inputs, attend: Attend, change: Callable[[Sequence], Sequence] = lambda one: one
) -> tuple[Array, ...]:
    """The whole case, each sequence attended by `attend` after `change`; stored."""
    q = inputs.arrays["q"]
    out = np.zeros(q.shape if q.ndim == 4 else (q.shape[0], 1, *q.shape[1:]), dtype=F32)
    for batch, one in enumerate(sequences(inputs)):
        out[batch] = attend(change(one)).swapaxes(0, 1)
    return stored(inputs, out.reshape(q.shape))


def attention(form: str, block: int | None = None) -> Kernel:
    """Attention by one schedule, contiguous or paged; without `block`, the case's pages or 16 keys."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        step = block or inputs.case.sizes.get("block", 16)
        return attended(inputs, schedule(form, inputs.storage.numpy_dtype, step))

    return run


def gathered(inputs: Inputs) -> tuple[Array, list[tuple[Array, Array]]]:
    """Queries (B, T, H, D), and each sequence's keys and values in order of position."""
    q, k_cache, v_cache = wide(inputs, "q", "k_cache", "v_cache")
    pairs = []
    for row, length in zip(inputs.settings["table"], inputs.settings["lens"], strict=True):
        slots = slots_of(row, int(length), k_cache.shape[1])
        keys, values = (cache.reshape(-1, *cache.shape[2:])[slots] for cache in (k_cache, v_cache))
        pairs.append((keys, values))
    return (q if q.ndim == 4 else q[:, None]), pairs


def with_arrays(inputs: Inputs, **changes: Array) -> Inputs:
    """The case with other arrays."""
    return replace(inputs, arrays={**inputs.arrays, **changes})


def with_settings(inputs: Inputs, **changes: Any) -> Inputs:
    """The case with other settings."""
    return replace(inputs, settings={**inputs.settings, **changes})
