"""Rotary embedding, softmax, activations, arithmetic: different formulas for the same function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferrum_ref.kernels.erf import erf, erfc
from ferrum_ref.parity.honest.sums import F32, Kernel, Total, stored, wide
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

FOUR_WAYS = ("whole", "piece by piece", "float64 inside", "backwards")


def rope(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, cos, sin = wide(inputs, "x", "cos", "sin")
        c, s = (table[inputs.settings["positions"]][:, None, :] for table in (cos, sin))
        return stored(inputs, turned(x, c, s, form))

    return run


def turned(x: Array, c: Array, s: Array, form: str = "plain") -> Array:
    """x (..., D) turned by the angles of c, s (..., D/2)."""
    first, second = np.split(x, 2, axis=-1)
    if form == "complex":
        both = (first + 1j * second).astype(np.complex64) * (c + 1j * s).astype(np.complex64)
        return np.concatenate([both.real, both.imag], axis=-1)
    if form == "rotate half":
        both_c, both_s = np.concatenate([c, c], axis=-1), np.concatenate([s, s], axis=-1)
        return np.asarray(x * both_c + np.concatenate([-second, first], axis=-1) * both_s)
    if form == "fused":  # one product exact, as a fused multiply-add leaves it
        upper = (first.astype(np.float64) * c - (second * s)).astype(F32)
        lower = (second.astype(np.float64) * c + (first * s)).astype(F32)
        return np.concatenate([upper, lower], axis=-1)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def softmax(form: str, total: Total) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        axis = inputs.case.sizes["axis"]
        x = np.moveaxis(wide(inputs, "x")[0], axis, -1)
        shifted = x - x.max(axis=-1, keepdims=True)
        weights = np.exp2(shifted * F32(np.log2(np.e))) if form == "exp2" else np.exp(shifted)
        norm = total(weights)
        p = weights * (F32(1.0) / norm) if form == "reciprocal" else weights / norm
        return stored(inputs, np.moveaxis(p, -1, axis))

    return run


def sigmoid(x: Array, form: str = "plain") -> Array:
    """1 / (1 + exp(-x)); "two sides" never overflows."""
    if form == "two sides":
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, F32(1.0) / (F32(1.0) + small), small / (F32(1.0) + small))
    if form == "tanh":
        return np.asarray(F32(0.5) * np.tanh(F32(0.5) * x) + F32(0.5))
    return np.asarray(F32(1.0) / (F32(1.0) + np.exp(-x)))


def silu_mul(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        gate, up = wide(inputs, "gate", "up")
        if form == "divide":
            return stored(inputs, gate / (F32(1.0) + np.exp(-gate)) * up)
        if form == "product first":
            return stored(inputs, gate * up * sigmoid(gate))
        return stored(inputs, gate * sigmoid(gate, form) * up)

    return run


def silu(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        if form == "divide":
            return stored(inputs, x / (F32(1.0) + np.exp(-x)))
        if form == "float64 inside":
            wide_x = x.astype(np.float64)
            return stored(inputs, (wide_x / (1.0 + np.exp(-wide_x))).astype(F32))
        return stored(inputs, x * sigmoid(x, form))

    return run


def gelu(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        half_root = F32(np.sqrt(0.5))
        if form == "erfc":
            return stored(inputs, F32(0.5) * x * _narrow(erfc, -x * half_root))
        if form == "divide":
            return stored(inputs, x * F32(0.5) * (F32(1.0) + _narrow(erf, x / F32(np.sqrt(2.0)))))
        if form == "half inside":
            return stored(inputs, x * (F32(0.5) + F32(0.5) * _narrow(erf, x * half_root)))
        return stored(inputs, F32(0.5) * x * (F32(1.0) + _narrow(erf, x * half_root)))

    return run


def _narrow(function: Callable[[Array], Array], x: Array) -> Array:
    """A function good to half a unit of float32."""
    return np.asarray(function(np.asarray(x).astype(np.float64))).astype(F32)


def gelu_tanh(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        (x,) = wide(inputs, "x")
        root, cubic = F32(np.sqrt(2.0 / np.pi)), F32(0.044715)
        inner = root * (x + cubic * x * x * x) if form == "plain" else root * x * (F32(1.0) + cubic * (x * x))
        if form == "sigmoid":
            return stored(inputs, x * sigmoid(inner + inner, "two sides"))
        if form == "half inside":
            return stored(inputs, x * (F32(0.5) + F32(0.5) * np.tanh(inner)))
        return stored(inputs, F32(0.5) * x * (F32(1.0) + np.tanh(inner)))

    return run


def arithmetic(operation: Callable[[Array, Array], Array], form: str) -> Kernel:
    """a + b and its like, in one of four ways."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        a, b = np.broadcast_arrays(*wide(inputs, "a", "b"))
        if form == "float64 inside":
            return stored(inputs, np.asarray(operation(a.astype(np.float64), b.astype(np.float64))).astype(F32))
        out = np.empty(a.size, dtype=F32)
        left, right = a.reshape(-1), b.reshape(-1)
        step = {"piece by piece": 7, "backwards": 13}.get(form, max(a.size, 1))
        starts = list(range(0, a.size, step))
        for start in reversed(starts) if form == "backwards" else starts:
            out[start : start + step] = operation(left[start : start + step], right[start : start + step])
        return stored(inputs, out.reshape(a.shape))

    return run


def relu(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        x = inputs.arrays["x"]
        if form == "whole":
            return (np.maximum(x, x.dtype.type(0)),)
        if form == "piece by piece":
            return (np.where(x < 0, np.zeros_like(x), x),)
        if form == "backwards":
            y = np.array(x)
            y[y < 0] = 0
            return (y,)
        return stored(inputs, np.maximum(x.astype(np.float64), 0.0))

    return run
