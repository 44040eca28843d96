"""Bound of the softmax.  Clause: PA-SOFTMAX-1."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array


def weight_error(model: ErrorModel, distance: Array, logit_error: Array | float = 0.0) -> Array:
    """E_j: relative error of exp(s_j - max), |s_j - max| = distance, the scores themselves being off by logit_error."""
    exponent = logit_error + model.algorithm.exponent_roundings * model.unit * distance
    error: Array = np.expm1(exponent) + model.tau(model.algorithm.exp_ulp) * np.exp(exponent)
    return error


def softmax_error(model: ErrorModel, logits: Array, value: Array) -> Array:
    """e of p = exp(s - max) / sum, along the last axis.

    e_j = p_j ((E_j + sum_k p_k E_k) / (1 - sum_k p_k E_k) + gamma_n + tau_div + u), E_j = u |s_j - max| + tau_exp
    (u times the declared exponent_roundings).
    logits, value (..., n) float64; a lane without any finite logit has no error to speak of. Pure.
    """
    num_terms = logits.shape[-1]
    if num_terms == 0:
        return np.zeros_like(value)
    finite = np.isfinite(logits)
    highest = np.max(np.where(finite, logits, -np.inf), axis=-1, keepdims=True)
    distance = np.where(finite, np.where(np.isfinite(highest), highest, 0.0) - np.where(finite, logits, 0.0), 0.0)
    weights = weight_error(model, distance)
    probabilities = np.where(finite, np.nan_to_num(value), 0.0)
    shared = np.sum(probabilities * weights, axis=-1, keepdims=True)
    division = model.tau(model.algorithm.div_ulp) + model.unit
    growth = (weights + shared) / np.maximum(1.0 - shared, model.unit) + model.gamma(model.additions(num_terms))
    error: Array = probabilities * (growth + division + model.extra) + 2.0 * model.flush
    return error
