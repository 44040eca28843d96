"""Bounds of SiLU, gated SiLU and GELU.  Clauses: PA-SILU-1, PA-GELU-1..2."""

from __future__ import annotations

import math

import numpy as np

from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array

CUBIC = 0.044715  # of the tanh form of GELU (Hendrycks and Gimpel 2016)


def silu_error(model: ErrorModel, gate: Array, factor: Array | float, value: Array) -> Array:
    """e of y = g sigma(g) f, sigma(g) = 1 / (1 + exp(-g)).

    e = |y| ((1 - sigma) tau_exp + tau_div + 3u) + flush |g f|. gate, value (...) float64. Pure.
    """
    algorithm = model.algorithm
    complement = 1.0 / (1.0 + np.exp(np.minimum(gate, 700.0)))
    moved = complement * model.tau(algorithm.exp_ulp)
    relative = moved / (1.0 - moved) + model.tau(algorithm.div_ulp) + 3.0 * model.unit + model.extra
    error: Array = np.abs(value) * relative + model.flush * (np.abs(gate * factor) + 1.0)
    return error


def gelu_erf_error(model: ErrorModel, x: Array, value: Array) -> Array:
    """e of y = 0.5 x (1 + erf(z)), z = x / sqrt(2).

    z carries 2u, so erf(z) moves by 2u |z| (2 / sqrt(pi)) exp(-z^2) and by tau_erf |erf(z)|; the addition and the last
    product add 2u |y|. On the negative side the sum cancels and the first two terms dominate. Pure.
    """
    z = x / math.sqrt(2.0)
    slope = 2.0 / math.sqrt(math.pi) * np.exp(-np.square(z))
    erf = np.abs(np.divide(2.0 * value, x, out=np.ones_like(x), where=x != 0) - 1.0)
    moved = 2.0 * model.unit * np.abs(z) * slope + model.tau(model.algorithm.erf_ulp) * erf
    error: Array = 0.5 * np.abs(x) * moved + (2.0 * model.unit + model.extra) * np.abs(value) + model.flush
    return error


def gelu_tanh_error(model: ErrorModel, x: Array, value: Array) -> Array:
    """e of y = 0.5 x (1 + tanh(t)), t = sqrt(2 / pi) (x + 0.044715 x^3).

    t carries gamma_7 (both its terms have one sign), so tanh(t) moves by gamma_7 |t| (1 - tanh(t)^2) + tau_tanh |tanh|;
    the addition and the last product add 2u |y|. The same number is x sigma(2t): there the relative error is
    (1 - sigma) (2 gamma_7 |t| + tau_exp) + tau_div + 3u, which is the larger around zero; either form is allowed. Pure.
    """
    argument = math.sqrt(2.0 / math.pi) * (x + CUBIC * x**3)
    tanh = np.tanh(argument)
    moved = model.gamma(7) * np.abs(argument) * (1.0 - np.square(tanh))
    moved = moved + model.tau(model.algorithm.tanh_ulp) * np.abs(tanh)
    by_tanh = 0.5 * np.abs(x) * moved + 2.0 * model.unit * np.abs(value)
    shifted = 0.5 * (1.0 - tanh) * (2.0 * model.gamma(7) * np.abs(argument) + model.tau(model.algorithm.exp_ulp))
    by_sigmoid = np.abs(value) * (np.expm1(shifted) + model.tau(model.algorithm.div_ulp) + 3.0 * model.unit)
    error: Array = np.maximum(by_tanh, by_sigmoid) + model.extra * np.abs(value) + model.flush * (np.abs(x) + 1.0)
    return error
