"""Bound of sums of products: linear, matmul.  Clauses: PA-DOT-1..3."""

from __future__ import annotations

import math

import numpy as np

from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array

TINY = float(np.finfo(np.float64).tiny)  # keeps an infinite gamma from meeting a zero


def dot_error(model: ErrorModel, left: Array, right: Array, value: Array, more_roundings: int = 0) -> Array:
    """e of value = left @ right over K terms.

    det:    (gamma_{K-1} + [products inexact] + 2 u_factor) * (|left| @ |right|)
    sharp:  lambda u sqrt(K) (||a * b||_2 + |y|) + lambda sqrt(2) u_factor ||a * b||_2, never above det
    left (..., M, K), right (..., K, N), value (..., M, N), all float64; more_roundings: of each term, before it is
    added (a factor scaled beforehand). Pure.
    """
    num_terms = left.shape[-1]
    magnitude = np.abs(left) @ np.abs(right)
    factor = 2.0 * model.factor_unit + model.factor_unit**2
    roundings = float(model.dot_roundings(num_terms)) + more_roundings
    growth = model.gamma(roundings)
    growth = growth + (factor * (1.0 + growth) if factor else 0.0) + model.extra
    error: Array = np.where(magnitude > 0.0, growth * np.maximum(magnitude, TINY), 0.0) + num_terms * model.underflow
    if not model.sharp or num_terms == 0:
        return error
    spread = np.sqrt(np.square(left) @ np.square(right))
    walk = model.unit * math.sqrt(max(roundings, 1.0)) * (spread + np.abs(value))
    factors = math.sqrt(2.0) * model.factor_unit * spread
    sharp: Array = model.confidence(roundings) * (walk + factors) + model.extra * magnitude
    smaller: Array = np.minimum(error, sharp + num_terms * model.underflow)
    return smaller
