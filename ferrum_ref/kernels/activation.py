"""Elementwise activations.   Clauses: KN-SILU-1..3, KN-GELU-1..3, KN-RELU-1."""

from __future__ import annotations

import math

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.erf import erfc
from ferrum_ref.kernels.rounding import FLOAT32, FLOAT64, Array, compute_dtype, round_to, widen


def silu(x: Array) -> Array:
    """y = x * sigmoid(x) = x / (1 + exp(-x))          [KN-SILU-1..2]

    Any shape, any float; computed in float32 at least; the result has x's type. Never overflows: far to the left it is
    x * exp(x), at -inf it is -0. Pure.  Source: Elfwing, Uchibe & Doya 2017, eq. 6.
    """
    dtype = compute_dtype("silu", x)
    with np.errstate(all="ignore"):
        return round_to(_silu(widen(x, dtype)), x.dtype)


def silu_mul(gate: Array, up: Array) -> Array:
    """y = silu(gate) * up          [KN-SILU-1..3]

    Equal shapes, any float; computed in float32 at least and rounded once; the result has gate's type. Pure.
    Raises ShapeError if the shapes differ.  Source: Shazeer 2020, eq. 6 (SwiGLU).
    """
    dtype = compute_dtype("silu_mul", gate, up)
    if gate.shape != up.shape:
        raise ShapeError(f"silu_mul: gate {gate.shape} and up {up.shape}, expected equal shapes")
    with np.errstate(all="ignore"):
        y = _silu(widen(gate, dtype))
        y *= widen(up, dtype)
        return round_to(y, gate.dtype)


def gelu(x: Array, approximate: str = "none") -> Array:
    """y = x/2 * erfc(-x / sqrt(2)), or for "tanh": y = x/2 * (1 + tanh(z)), z = sqrt(2/pi) (x + 0.044715 x**3)

    [KN-GELU-1..3] Any shape, any float; computed in float64 and rounded once; the result has x's type. The tanh form is
    evaluated as x * sigmoid(2 z), which keeps its relative accuracy for negative x. Pure.
    Raises InvalidParameterError for another `approximate`.  Source: Hendrycks & Gimpel 2016, section 2.
    """
    compute_dtype("gelu", x)
    with np.errstate(all="ignore"):
        wide = widen(x, FLOAT64)
        if approximate == "none":
            y = wide * 0.5 * erfc(wide * -math.sqrt(0.5))
        elif approximate == "tanh":
            y = _scaled_sigmoid(wide, wide * (1.0 + 0.044715 * wide * wide) * (2.0 * math.sqrt(2.0 / math.pi)))
        else:
            raise InvalidParameterError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
        if wide.ndim == 0:
            y = np.asarray(y)
        y[wide == -np.inf] = -0.0
        return round_to(y, x.dtype)


def relu(x: Array) -> Array:
    """y = max(x, 0), NaN stays NaN          [KN-RELU-1]

    Any shape, any float; exact; the result has x's type. Pure.
    """
    dtype = compute_dtype("relu", x)
    with np.errstate(all="ignore"):
        return round_to(np.asarray(np.maximum(widen(x, dtype), dtype.type(0))), x.dtype)


def _silu(x: Array) -> Array:
    return _scaled_sigmoid(x, x)


def _scaled_sigmoid(x: Array, z: Array) -> Array:
    """x / (1 + exp(-z)), elementwise; where exp(-z) would overflow, x * exp(z), and 0 where exp(z) is 0."""
    y = np.asarray(np.negative(z))
    np.exp(y, out=y)
    y += 1
    np.divide(x, y, out=y)
    far = z < (-80.0 if y.dtype == FLOAT32 else -700.0)
    if far.any():
        left = np.exp(z[far])
        y[far] = np.where(left > 0, x[far] * left, y.dtype.type(-0.0))
    return y
