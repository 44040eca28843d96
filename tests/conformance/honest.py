"""Legitimate algorithms: different orders of summation, schedules and formulas that all keep their declaration.

Each is a function of `Inputs` in float32, written apart from the project's kernels, with one rounding to the storage
type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.special
from honest_attention import attention, paged_attention
from honest_sums import DOTS, F32, TOTALS, Array, Dot, stored, total_lanes, total_pairwise, total_sequential, wide

from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.types.algorithm import Algorithm

PLAIN = Algorithm()


@dataclass(frozen=True)
class Honest:
    operation: str
    name: str
    run: Callable[[Inputs], tuple[Array, ...]]
    algorithm: Algorithm = PLAIN


def linear(dot: Dot) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, weight = wide(inputs, "x", "weight")
        rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        return stored(inputs, dot(rows, weight.T).reshape(*x.shape[:-1], weight.shape[0]))

    return run


def matmul(dot: Dot) -> Callable[[Inputs], tuple[Array, ...]]:
    return lambda inputs: stored(inputs, dot(*wide(inputs, "a", "b")))


# Norms ----------------------------------------------------------------------------------------------------------------


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
