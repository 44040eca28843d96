"""Legitimate algorithms: different orders of summation, schedules and formulas that all keep their declaration.

Each is a function of `Inputs` in float32, written apart from the project's kernels, with one rounding to the storage type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.paged import slots_of
from ferrum_ref.types.algorithm import Algorithm

F32 = np.float32
Array = np.ndarray[Any, Any]
Dot = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Honest:
    operation: str
    name: str
    run: Callable[[Inputs], tuple[Array, ...]]
    algorithm: Algorithm = Algorithm()


def wide(inputs: Inputs, *names: str) -> list[Array]:
    return [inputs.arrays[name].astype(F32) for name in names]


def stored(inputs: Inputs, *results: Array) -> tuple[Array, ...]:
    return tuple(result.astype(inputs.storage.numpy_dtype) for result in results)


# Dot products a (..., M, K) @ b (..., K, N), five orders of summation -------------------------------------------------


def dot_blas(a: Array, b: Array) -> Array:
    return np.matmul(a, b)


def dot_sequential(a: Array, b: Array) -> Array:
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype=a.dtype)
    for k in range(a.shape[-1]):
        total = total + a[..., :, k, None] * b[..., None, k, :]
    return total


def dot_pairwise(a: Array, b: Array) -> Array:
    return np.add.reduce(np.ascontiguousarray(a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :]), axis=-1)


def dot_split(a: Array, b: Array, step: int = 16) -> Array:
    parts = [a[..., k : k + step] @ b[..., k : k + step, :] for k in range(0, a.shape[-1], step)]
    return sum(parts[1:], parts[0]) if parts else a @ b


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


DOTS: dict[str, Dot] = {
    "blas": dot_blas,
    "sequential": dot_sequential,
    "pairwise": dot_pairwise,
    "split": dot_split,
    "backwards": dot_backwards,
    "compensated": dot_compensated,
}


def linear(dot: Dot) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, weight = wide(inputs, "x", "weight")
        rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        return stored(inputs, dot(rows, weight.T).reshape(*x.shape[:-1], weight.shape[0]))

    return run


def matmul(dot: Dot) -> Callable[[Inputs], tuple[Array, ...]]:
    return lambda inputs: stored(inputs, dot(*wide(inputs, "a", "b")))


# Norms ----------------------------------------------------------------------------------------------------------------


def total_sequential(x: Array) -> Array:
    total = np.zeros((*x.shape[:-1], 1), dtype=x.dtype)
    for k in range(x.shape[-1]):
        total = total + x[..., k : k + 1]
    return total


def total_pairwise(x: Array) -> Array:
    return np.add.reduce(np.ascontiguousarray(x), axis=-1, keepdims=True)


def total_lanes(x: Array, lanes: int = 8) -> Array:
    """Eight running sums side by side, as a vector unit keeps them."""
    whole = x.shape[-1] // lanes * lanes
    parts = x[..., :whole].reshape(*x.shape[:-1], whole // lanes, lanes)
    partial = np.zeros((*x.shape[:-1], lanes), dtype=x.dtype)
    for k in range(parts.shape[-2]):
        partial = partial + parts[..., k, :]
    return total_sequential(np.concatenate([partial, x[..., whole:]], axis=-1))


def total_double(x: Array) -> Array:
    return x.astype(np.float64).sum(axis=-1, keepdims=True).astype(F32)


TOTALS = {
    "sequential": total_sequential,
    "pairwise": total_pairwise,
    "lanes": total_lanes,
    "double": total_double,
}


def root_mean(x: Array, eps: float, total: Callable[[Array], Array], reciprocal: bool) -> Array:
    squares = total(x * x)
    mean = squares * F32(1.0 / x.shape[-1]) if reciprocal else squares / F32(x.shape[-1])
    return F32(1.0) / np.sqrt(mean + F32(eps))


def rms_norm(total: Callable[[Array], Array], order: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, weight = wide(inputs, "x", "weight")
        return stored(inputs, scaled(x, weight, root_mean(x, inputs.settings["eps"], total, order == "late"), order))

    return run


def scaled(x: Array, weight: Array, root: Array, order: str) -> Array:
    if order == "divide":
        return x / (F32(1.0) / root) * weight
    return x * (root * weight) if order == "weight first" else x * root * weight


def rms_norm_residual(total: Callable[[Array], Array], order: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, residual, weight = wide(inputs, "x", "residual", "weight")
        joined = x + residual
        root = root_mean(joined, inputs.settings["eps"], total, order == "late")
        return stored(inputs, scaled(joined, weight, root, order), joined)

    return run


def layer_norm(total: Callable[[Array], Array], welford: bool = False) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, weight = wide(inputs, "x", "weight")
        size = F32(x.shape[-1])
        mean = total(x) / size
        if welford:
            mean, variance = welford_moments(x)
        else:
            variance = total((x - mean) ** 2) / size
        y = (x - mean) * (F32(1.0) / np.sqrt(variance + F32(inputs.settings["eps"]))) * weight
        if "bias" in inputs.arrays:
            y = y + wide(inputs, "bias")[0]
        return stored(inputs, y)

    return run


def welford_moments(x: Array) -> tuple[Array, Array]:
    mean, spread = np.zeros((*x.shape[:-1], 1), dtype=F32), np.zeros((*x.shape[:-1], 1), dtype=F32)
    for k in range(x.shape[-1]):
        value = x[..., k : k + 1]
        delta = value - mean
        mean = mean + delta / F32(k + 1)
        spread = spread + delta * (value - mean)
    return mean, spread / F32(x.shape[-1])


# Rotary embedding -----------------------------------------------------------------------------------------------------


def rope(form: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, cos, sin = wide(inputs, "x", "cos", "sin")
        c, s = (table[inputs.settings["positions"]][:, None, :] for table in (cos, sin))
        first, second = np.split(x, 2, axis=-1)
        if form == "complex":
            turned = (first + 1j * second).astype(np.complex64) * (c + 1j * s).astype(np.complex64)
            return stored(inputs, np.concatenate([turned.real, turned.imag], axis=-1))
        if form == "rotate half":
            both_c, both_s = np.concatenate([c, c], axis=-1), np.concatenate([s, s], axis=-1)
            return stored(inputs, x * both_c + np.concatenate([-second, first], axis=-1) * both_s)
        if form == "fused":  # one product exact, as a fused multiply-add leaves it
            upper = (first.astype(np.float64) * c - (second * s)).astype(F32)
            lower = (second.astype(np.float64) * c + (first * s)).astype(F32)
            return stored(inputs, np.concatenate([upper, lower], axis=-1))
        return stored(inputs, np.concatenate([first * c - second * s, second * c + first * s], axis=-1))

    return run


# Softmax --------------------------------------------------------------------------------------------------------------


def softmax(form: str, total: Callable[[Array], Array]) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        axis = inputs.case.sizes["axis"]
        x = np.moveaxis(wide(inputs, "x")[0], axis, -1)
        shifted = x - x.max(axis=-1, keepdims=True)
        weights = np.exp2(shifted * F32(np.log2(np.e))) if form == "exp2" else np.exp(shifted)
        norm = total(weights)
        p = weights * (F32(1.0) / norm) if form == "reciprocal" else weights / norm
        return stored(inputs, np.moveaxis(p, -1, axis))

    return run


# Attention over lists of (q (T, H, D), k (S, G, D), v (S, G, D), visible (T, S)) --------------------------------------


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


# Activations and the rest ---------------------------------------------------------------------------------------------


def sigmoid(x: Array, form: str) -> Array:
    if form == "two sides":
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, F32(1.0) / (F32(1.0) + small), small / (F32(1.0) + small))
    return F32(1.0) / (F32(1.0) + np.exp(-x))


def silu_mul(form: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        gate, up = wide(inputs, "gate", "up")
        if form == "divide":
            return stored(inputs, gate / (F32(1.0) + np.exp(-gate)) * up)
        if form == "product first":
            return stored(inputs, gate * up * sigmoid(gate, "plain"))
        return stored(inputs, gate * sigmoid(gate, form) * up)

    return run


def silu(form: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        return stored(inputs, x / (F32(1.0) + np.exp(-x)) if form == "divide" else x * sigmoid(x, form))

    return run


def gelu(form: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        half_root = F32(np.sqrt(0.5))
        if form == "erfc":
            return stored(inputs, F32(0.5) * x * scipy.special.erfc(-x * half_root).astype(F32))
        if form == "divide":
            return stored(inputs, x * F32(0.5) * (F32(1.0) + scipy.special.erf(x / F32(np.sqrt(2.0))).astype(F32)))
        if form == "half inside":
            return stored(inputs, x * (F32(0.5) + F32(0.5) * scipy.special.erf(x * half_root).astype(F32)))
        return stored(inputs, F32(0.5) * x * (F32(1.0) + scipy.special.erf(x * half_root).astype(F32)))

    return run


def gelu_tanh(form: str) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        root, cubic = F32(np.sqrt(2.0 / np.pi)), F32(0.044715)
        inner = root * (x + cubic * x * x * x) if form == "plain" else root * x * (F32(1.0) + cubic * (x * x))
        return stored(inputs, F32(0.5) * x * (F32(1.0) + np.tanh(inner)))

    return run


def embedding(inputs: Inputs) -> tuple[Array, ...]:
    return (np.take(inputs.arrays["table"], inputs.settings["ids"], axis=0),)


def argmax(inputs: Inputs) -> tuple[Array, ...]:
    return (np.array(np.argmax(inputs.arrays["logits"].astype(np.float64)), dtype=np.int64),)


def write_kv(inputs: Inputs) -> tuple[Array, ...]:
    cache, slots = inputs.arrays["cache"].copy(), inputs.settings["slots"]
    kept = slots >= 0
    cache.reshape(-1, *cache.shape[2:])[slots[kept]] = inputs.arrays["rows"][kept]
    return (cache,)


def sum_of(inputs: Inputs) -> tuple[Array, ...]:
    a, b = wide(inputs, "a", "b")
    return stored(inputs, a + b)


def product_of(inputs: Inputs) -> tuple[Array, ...]:
    a, b = wide(inputs, "a", "b")
    return stored(inputs, a * b)


ATTENTION_FORMS = {
    "plain": Algorithm(),
    "sequential": Algorithm(),
    "scaled q": Algorithm(),
    "normalised first": Algorithm(),
    "rounded P": Algorithm(rounds_probabilities=True),
    "exp2": Algorithm(exponent_roundings=3),
}
ORDERS = ("plain", "late", "weight first", "divide")

HONEST: tuple[Honest, ...] = (
    *(Honest("linear", name, linear(dot)) for name, dot in DOTS.items()),
    *(Honest("matmul", name, matmul(dot)) for name, dot in DOTS.items()),
    *(
        Honest(operation, f"{name}, {order}", make(total, order))
        for operation, make in (("rms_norm", rms_norm), ("rms_norm_residual", rms_norm_residual))
        for (name, total), order in zip(TOTALS.items(), ORDERS, strict=True)
    ),
    *(Honest("layer_norm", name, layer_norm(total)) for name, total in TOTALS.items()),
    Honest("layer_norm", "welford", layer_norm(total_sequential, welford=True)),
    *(Honest("rotary_embedding", form, rope(form)) for form in ("plain", "complex", "rotate half", "fused")),
    Honest("softmax", "plain", softmax("plain", total_pairwise)),
    Honest("softmax", "sequential", softmax("plain", total_sequential)),
    Honest("softmax", "reciprocal", softmax("reciprocal", total_lanes)),
    Honest("softmax", "exp2", softmax("exp2", total_pairwise), Algorithm(exponent_roundings=3)),
    *(Honest("attention", form, attention(form), algorithm) for form, algorithm in ATTENTION_FORMS.items()),
    Honest("attention", "online 16", attention("online", 16), Algorithm(key_block=16)),
    Honest("attention", "online 1", attention("online", 1), Algorithm(key_block=1)),
    Honest("attention", "split 8", attention("split", 8), Algorithm(key_block=8)),
    *(Honest("paged_attention", form, paged_attention(form), algorithm) for form, algorithm in ATTENTION_FORMS.items()),
    Honest("paged_attention", "page by page", paged_attention("online"), Algorithm(key_block=1)),
    Honest("paged_attention", "split 8", paged_attention("split", 8), Algorithm(key_block=8)),
    *(Honest("silu_mul", form, silu_mul(form)) for form in ("plain", "divide", "two sides", "product first")),
    *(Honest("silu", form, silu(form)) for form in ("plain", "divide", "two sides")),
    *(Honest("gelu", form, gelu(form)) for form in ("plain", "divide", "erfc", "half inside")),
    *(Honest("gelu_tanh", form, gelu_tanh(form)) for form in ("plain", "factored")),
    Honest("embedding", "take", embedding),
    Honest("argmax", "first", argmax),
    Honest("write_kv", "scatter", write_kv),
    Honest("add", "plain", sum_of),
    Honest("mul", "plain", product_of),
)
