"""Bound of a projection by packed weights.  Clauses: PA-QLINEAR-1..2."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.bounds.dot import dot_error
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array

BLOCK = 32  # weights that share a scale
LARGEST_CODE = 127.0  # of activations rounded to 8 bits


def quantized_linear_error(
    model: ErrorModel, x: Array, weight: Array, scales: Array, zero: float, value: Array
) -> Array:
    """e of y = x @ W.T, W = d (q - z) exact.

    gamma_{K+1} sum |d (q - z)| |x|: the sum, the product with x, and one rounding where d is multiplied in. A declared
    `folds_zero_point` has |q| + |z| for |q - z|; `quantizes_activations` adds half a step of each block's 8-bit grid.
    x (M, K), weight (N, K), scales (N, K / 32) the |d|, value (M, N), float64. Pure.
    """
    roundings = 2 if model.products_are_exact else 1  # of each term, beside the additions
    magnitudes = np.abs(weight)
    if model.algorithm.folds_zero_point and zero:
        magnitudes = magnitudes + 2.0 * zero * np.repeat(scales, BLOCK, axis=-1)
    error = dot_error(model, x, magnitudes.T if model.algorithm.folds_zero_point else weight.T, value, roundings)
    if model.algorithm.quantizes_activations:
        blocks = np.abs(x).reshape(x.shape[0], x.shape[1] // BLOCK, BLOCK)
        half_steps = np.repeat(blocks.max(axis=-1, initial=0.0), BLOCK, axis=-1) / (2.0 * LARGEST_CODE)
        error = error + (1.0 + model.gamma(4)) * (half_steps @ np.abs(weight).T)
    return error
