"""RMSNorm and LayerNorm in different orders and formulas."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.honest.sums import F32, Kernel, Total, stored, wide
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

ORDERS = ("plain", "late", "weight first", "divide")


def root_mean(x: Array, eps: float, total: Total, reciprocal: bool) -> Array:
    """1 / sqrt(mean(x^2) + eps), the mean by a division or by a product with the reciprocal."""
    squares = total(x * x)
    mean = squares * F32(1.0 / x.shape[-1]) if reciprocal else squares / F32(x.shape[-1])
    return np.asarray(F32(1.0) / np.sqrt(mean + F32(eps)))


def scaled(x: Array, weight: Array, root: Array, order: str) -> Array:
    """x times root times weight, in one of the orders."""
    if order == "divide":
        return np.asarray(x / (F32(1.0) / root) * weight)
    return np.asarray(x * (root * weight) if order == "weight first" else x * root * weight)


def rms_norm(total: Total, order: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, weight = wide(inputs, "x", "weight")
        return stored(inputs, scaled(x, weight, root_mean(x, inputs.settings["eps"], total, order == "late"), order))

    return run


def rms_norm_residual(total: Total, order: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, residual, weight = wide(inputs, "x", "residual", "weight")
        joined = x + residual
        root = root_mean(joined, inputs.settings["eps"], total, order == "late")
        return stored(inputs, scaled(joined, weight, root, order), joined)

    return run


def layer_norm(total: Total, welford: bool = False) -> Kernel:
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
    """Mean and variance in one pass, element by element."""
    mean, spread = np.zeros((*x.shape[:-1], 1), dtype=F32), np.zeros((*x.shape[:-1], 1), dtype=F32)
    for k in range(x.shape[-1]):
        value = x[..., k : k + 1]
        delta = value - mean
        mean = mean + delta / F32(k + 1)
        spread = spread + delta * (value - mean)
    return mean, spread / F32(x.shape[-1])
