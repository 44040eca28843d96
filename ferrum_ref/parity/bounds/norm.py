"""Bounds of RMSNorm and LayerNorm.  Clauses: PA-RMSNORM-1..2, PA-LAYERNORM-1."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array


def _inverse_root_error(relative: Array) -> Array:
    """|(1 + t)^(-1/2) - 1| for |t| <= relative: 0.5 t, with its higher orders."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(relative < 1.0, 1.0 / np.sqrt(np.maximum(1.0 - relative, 0.0)) - 1.0, np.inf)


def rms_norm_error(model: ErrorModel, x: Array, eps: float, value: Array, input_error: float = 0.0) -> Array:
    """e of y = x / sqrt(mean(x^2) + eps) * w.

    e = |y| ((1 - t)^(-1/2) - 1 + tau_rsqrt + 2u), t = (gamma_n + 2u) m / (m + eps) + 2u, m the mean square.
    x, value (..., n) float64; input_error: relative error of each x before the norm reads it (a residual sum). Pure.
    """
    num_terms = x.shape[-1]
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True) if num_terms else np.zeros((*x.shape[:-1], 1))
    unit = model.unit
    squares = model.gamma(model.additions(num_terms) + 1.0) + 2.0 * unit + 2.0 * input_error + input_error**2
    total = mean_square + eps
    share = np.divide(mean_square, total, out=np.zeros_like(total), where=total > 0)
    relative = _inverse_root_error(squares * share + 2.0 * unit)
    functions = model.tau(model.algorithm.rsqrt_ulp) + 2.0 * unit + input_error + model.extra
    error: Array = np.abs(value) * (relative + functions) + model.flush
    return error


def layer_norm_error(model: ErrorModel, x: Array, weight: Array, eps: float, value: Array) -> Array:
    """e of y = (x - mu) r w + b, r = 1 / sqrt(var + eps), mean first and deviations second.

    e = |w| r (d + u |x - mu|) + |(x - mu) r w| (0.5 rho + tau_rsqrt + 3u) + u |y|, d = gamma_n mean|x| + u |mu|,
    rho = (gamma_{n+4} (var + d^2) + d^2) / (var + eps) + 2u. x, value (..., n), weight (n,), float64. Pure.
    """
    num_terms = x.shape[-1]
    if num_terms == 0:
        return np.zeros_like(value)
    unit = model.unit
    mean = np.mean(x, axis=-1, keepdims=True)
    shift = model.gamma(model.additions(num_terms) + 1.0) * np.mean(np.abs(x), axis=-1, keepdims=True)
    shift = shift + unit * np.abs(mean)
    centred = x - mean
    variance = np.mean(np.square(centred), axis=-1, keepdims=True)
    root = 1.0 / np.sqrt(variance + eps)
    spread = model.gamma(model.additions(num_terms) + 5.0) * (variance + shift**2) + shift**2
    relative = _inverse_root_error(spread / (variance + eps) + 2.0 * unit)
    functions = model.tau(model.algorithm.rsqrt_ulp) + 3.0 * unit + model.extra
    error: Array = np.abs(weight) * root * (shift + unit * np.abs(centred)) * (1.0 + relative)
    rest: Array = np.abs(centred * root * weight) * (relative + functions) + unit * np.abs(value) + model.flush
    return error + rest
