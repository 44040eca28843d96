"""Bugs of activations, softmax and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ferrum_ref.parity.honest.attention import with_arrays
from ferrum_ref.parity.honest.elementwise import arithmetic, gelu, gelu_tanh, sigmoid, silu_mul
from ferrum_ref.parity.honest.sums import F32, stored, wide
from ferrum_ref.parity.mutants.mutant import SIXTEEN_BITS, Mutant
from ferrum_ref.parity.mutants.partial import (
    elements_kept,
    nan_taken_for_zero,
    rows_taken_for_contiguous,
    saturating,
)
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]


def gate_and_up_swapped(inputs: Inputs) -> Outputs:
    return silu_mul("plain")(with_arrays(inputs, gate=inputs.arrays["up"], up=inputs.arrays["gate"]))


def silu_rounded_before_product(inputs: Inputs) -> Outputs:
    gate, up = wide(inputs, "gate", "up")
    (activated,) = stored(inputs, gate * sigmoid(gate))
    return stored(inputs, activated.astype(F32) * up)


def sigmoid_rounded(inputs: Inputs) -> Outputs:
    gate, up = wide(inputs, "gate", "up")
    (rounded,) = stored(inputs, sigmoid(gate))
    return stored(inputs, gate * rounded.astype(F32) * up)


def sigmoid_alone(inputs: Inputs) -> Outputs:
    gate, up = wide(inputs, "gate", "up")
    return stored(inputs, sigmoid(gate) * up)


def overflow_to_nan(inputs: Inputs) -> Outputs:
    """exp(x) / (1 + exp(x)) is infinity over infinity beyond 88."""
    gate, up = wide(inputs, "gate", "up")
    grown = np.exp(gate)
    return stored(inputs, gate * (grown / (F32(1.0) + grown)) * up)


def hard_sigmoid(inputs: Inputs) -> Outputs:
    (x,) = wide(inputs, "x")
    return stored(inputs, x * np.clip(x / F32(6.0) + F32(0.5), 0, 1))


def exponential_of_few_terms(inputs: Inputs) -> Outputs:
    """An exponential good to 1e-4, as a table or a short polynomial gives it."""
    (x,) = wide(inputs, "x")
    turns = -x * F32(math.log2(math.e))
    whole = np.floor(turns)
    part = (turns - whole).astype(F32)
    power = F32(1.0) + part * (F32(0.6951786) + part * (F32(0.2276458) + part * F32(0.0780245)))
    return stored(inputs, x / (F32(1.0) + np.ldexp(power, np.clip(whole, -140, 140).astype(np.int32))))


def erf_by_polynomial(inputs: Inputs) -> Outputs:
    """Abramowitz and Stegun 7.1.26, good to 1.5e-7 absolute: nothing of the tail is right."""
    (x,) = wide(inputs, "x")
    z = np.abs(x) * F32(math.sqrt(0.5))
    t = F32(1.0) / (F32(1.0) + F32(0.3275911) * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (F32(1.0) - series.astype(F32) * np.exp(-z * z))
    return stored(inputs, F32(0.5) * x * (F32(1.0) + erf))


def quick_gelu(inputs: Inputs) -> Outputs:
    (x,) = wide(inputs, "x")
    return stored(inputs, x * sigmoid(F32(1.702) * x))


def tanh_constants(cubic: float, root: float) -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        (x,) = wide(inputs, "x")
        return stored(inputs, F32(0.5) * x * (F32(1.0) + np.tanh(F32(root) * (x + F32(cubic) * x * x * x))))

    return run


def tail_of_row_untouched(inputs: Inputs) -> Outputs:
    """Vectors of four elements: what is left over of a row is not written."""
    (y,) = silu_mul("plain")(inputs)
    y = np.array(y)
    y[..., y.shape[-1] // 4 * 4 :] = 0
    return (y,)


def _softmax(inputs: Inputs, axis: int, form: str = "") -> Outputs:
    (x,) = wide(inputs, "x")
    weights = np.exp(x if form == "no maximum" else x - x.max(axis=axis, keepdims=True))
    if form == "rounded":
        weights = stored(inputs, weights)[0].astype(F32)
    total = weights.sum(axis=axis, keepdims=True)
    if form == "sum in 16 bits":
        total = weights.astype(np.float16).sum(axis=axis, keepdims=True, dtype=np.float16).astype(F32)
    if form == "guarded":
        total = total + F32(1e-6)
    if form == "empty is zero":
        return stored(inputs, np.nan_to_num(weights / total))
    return stored(inputs, weights / total)


def softmax_from_zero(inputs: Inputs) -> Outputs:
    """The maximum starts at zero: a lane far below it is zero over zero."""
    (x,) = wide(inputs, "x")
    axis = _axis(inputs)
    weights = np.exp(x - np.maximum(x.max(axis=axis, keepdims=True, initial=0.0), F32(0.0)))
    return stored(inputs, weights / weights.sum(axis=axis, keepdims=True))


def _axis(inputs: Inputs) -> int:
    return int(inputs.case.sizes["axis"])


def half_reciprocal(inputs: Inputs) -> Outputs:
    """The reciprocal is rounded to the storage type before it multiplies."""
    a, b = wide(inputs, "a", "b")
    (reciprocal,) = stored(inputs, F32(1.0) / b)
    return stored(inputs, a * reciprocal.astype(F32))


def reciprocal_product(inputs: Inputs) -> Outputs:
    """a (1 / b): two roundings where one is declared."""
    a, b = wide(inputs, "a", "b")
    return stored(inputs, a * (F32(1.0) / b))


def zero_without_sign(inputs: Inputs) -> Outputs:
    """b + 0: the sign of a zero is lost, and with it that of the infinity."""
    a, b = wide(inputs, "a", "b")
    return stored(inputs, a / (b + F32(0.0)))


def difference_reversed(inputs: Inputs) -> Outputs:
    a, b = wide(inputs, "a", "b")
    return stored(inputs, b - a)


def sum_of_first_row(inputs: Inputs) -> Outputs:
    """The second operand is broadcast from its first row, whatever its shape."""
    a, b = wide(inputs, "a", "b")
    first = b[:1] if b.ndim and b.shape[0] else b
    return stored(inputs, a + np.broadcast_to(first, b.shape))


def subnormals_flushed(inputs: Inputs) -> Outputs:
    a, b = wide(inputs, "a", "b")
    y = a * b
    return stored(inputs, np.where(np.abs(y) < F32(inputs.storage.smallest_normal), F32(0.0), y))


def relu_drops_nan(inputs: Inputs) -> Outputs:
    (x,) = wide(inputs, "x")
    return stored(inputs, np.fmax(x, F32(0.0)))


def relu_leaks(inputs: Inputs) -> Outputs:
    (x,) = wide(inputs, "x")
    return stored(inputs, np.where(x < 0, F32(0.01) * x, x))


HALVES = rows_taken_for_contiguous(silu_mul("plain"), "gate", "up")
ACTIVATION: tuple[Mutant, ...] = (
    Mutant("activation", "silu_mul", "gate and up swapped", gate_and_up_swapped),
    Mutant("activation", "silu_mul", "rounded before the product", silu_rounded_before_product, SIXTEEN_BITS),
    Mutant("activation", "silu_mul", "sigmoid rounded to storage", sigmoid_rounded, SIXTEEN_BITS),
    Mutant("activation", "silu_mul", "sigmoid for silu", sigmoid_alone),
    Mutant("activation", "silu_mul", "overflow to NaN", overflow_to_nan),
    Mutant("activation", "silu_mul", "tail of the row not written", tail_of_row_untouched),
    Mutant("activation", "silu", "hard sigmoid", hard_sigmoid),
    Mutant("activation", "silu", "coarse exponential", exponential_of_few_terms),
    Mutant("activation", "gelu", "tanh form for erf form", gelu_tanh("plain")),
    Mutant("activation", "gelu", "erf by a short polynomial", erf_by_polynomial, ("fp32",)),
    Mutant("activation", "gelu", "x sigmoid(1.702 x)", quick_gelu),
    Mutant("activation", "gelu_tanh", "cubic term 0.044", tanh_constants(0.044, math.sqrt(2.0 / math.pi))),
    Mutant("activation", "gelu_tanh", "0.8 for sqrt(2 / pi)", tanh_constants(0.044715, 0.8)),
    Mutant("activation", "relu", "NaN becomes zero", relu_drops_nan),
    Mutant("activation", "relu", "negative numbers leak", relu_leaks),
    Mutant(
        "activation",
        "silu_mul",
        "halves taken for contiguous",
        rows_taken_for_contiguous(silu_mul("plain"), "gate", "up"),
    ),
    Mutant("activation", "gelu", "NaN taken for zero", nan_taken_for_zero(gelu("plain"))),
)
PRIMITIVE: tuple[Mutant, ...] = (
    Mutant("primitive", "softmax", "maximum not subtracted", lambda one: _softmax(one, _axis(one), "no maximum")),
    Mutant("primitive", "softmax", "along the last axis always", lambda one: _softmax(one, -1)),
    Mutant("primitive", "softmax", "weights rounded", lambda one: _softmax(one, _axis(one), "rounded"), SIXTEEN_BITS),
    Mutant("primitive", "softmax", "sum in half precision", lambda one: _softmax(one, _axis(one), "sum in 16 bits")),
    Mutant(
        "primitive", "softmax", "1e-6 added to the sum", lambda one: _softmax(one, _axis(one), "guarded"), ("fp32",)
    ),
    Mutant("primitive", "softmax", "empty lane is zero", lambda one: _softmax(one, _axis(one), "empty is zero")),
    Mutant("primitive", "div", "reciprocal rounded to storage", half_reciprocal, SIXTEEN_BITS),
    Mutant("primitive", "sub", "operands reversed", difference_reversed),
    Mutant("primitive", "add", "second operand's first row for all", sum_of_first_row),
    Mutant("primitive", "mul", "subnormal results flushed", subnormals_flushed),
    Mutant("primitive", "softmax", "maximum starts at zero", softmax_from_zero),
    Mutant("primitive", "div", "product with the reciprocal", reciprocal_product, ("fp32",)),
    Mutant("primitive", "div", "zero without its sign", zero_without_sign),
    Mutant("primitive", "add", "only 1024 elements", elements_kept(arithmetic(np.add, "whole"), 1024)),
    Mutant("primitive", "mul", "overflow saturates", saturating(arithmetic(np.multiply, "whole"))),
)
