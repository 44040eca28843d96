"""Bound of a projection by packed weights.  Clauses: PA-QLINEAR-1..3."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.bounds.dot import dot_error
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array

BLOCK = 32  # weights that share a scale in upstream's two schemes, and activations that are rounded together
LARGEST_CODE = 127.0  # of activations rounded to 8 bits


def quantized_linear_error(
    model: ErrorModel, x: Array, weight: Array, scales: Array, zero: float, value: Array
) -> Array:
    """e of y = x @ W.T, W = d (q - z) exact.

    gamma_{K+1} sum |d (q - z)| |x|: the sum, the product with x, and one rounding where d is multiplied in. A declared
    `folds_zero_point` has |q| + |z| for |q - z|; `quantizes_activations` adds half a step of each block's 8-bit grid.
    x (M, K), weight (N, K), scales (N, K / 32) the |d|, value (M, N), float64. Pure.
    """
    magnitudes = np.abs(weight)
    if model.algorithm.folds_zero_point and zero:
        magnitudes = magnitudes + 2.0 * zero * np.repeat(scales, BLOCK, axis=-1)
    folds = int(model.algorithm.folds_zero_point)  # |q - z| + 2 |z| covers the addition that folding costs
    return packed_linear_error(model, x, weight, magnitudes, 2 - folds, value)


def packed_linear_error(
    model: ErrorModel, x: Array, weight: Array, magnitudes: Array, roundings: int, value: Array
) -> Array:
    """e of y = x @ W.T: gamma_{K-1+r} sum M |x|, r roundings of a term: its weight's making and its product with x.

    magnitudes M (N, K) are the |W|; with a declared `folds_zero_point`, sum d q x + sum m x, the |d q| + |m| of the
    parts, and one addition more. `quantizes_activations` as above, the |W| of 32 inputs times half their step.
    x (M, K), weight (N, K), value (M, N), float64. Pure.
    """
    folds = model.algorithm.folds_zero_point
    more = roundings + int(folds) - (0 if model.products_are_exact else 1)  # dot_error counts an inexact product itself
    error = dot_error(model, x, (magnitudes if folds else weight).T, value, more)
    if model.algorithm.quantizes_activations:
        padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % BLOCK)))
        blocks = padded.reshape(x.shape[0], padded.shape[1] // BLOCK, BLOCK)
        half_steps = np.repeat(blocks.max(axis=-1, initial=0.0), BLOCK, axis=-1) / (2.0 * LARGEST_CODE)
        error = error + (1.0 + model.gamma(4)) * (half_steps[:, : x.shape[1]] @ np.abs(weight).T)
    return error
