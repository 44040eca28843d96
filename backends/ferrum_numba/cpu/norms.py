"""Normalisations over the last axis and softmax: what is checked, and what is launched.

Clauses: BK-NCPU-8 (specs/backend_numba.md), KN-RMSNORM-*, KN-LAYERNORM-*, KN-SOFTMAX-* (specs/kernels.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu import rows
from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.conversion import KINDS, computable, round_to, run_of, widen
from ferrum_ref.errors import ShapeError

Array = NDArray[Any]


def rms_norm(x: Array, weight: Array, eps: float, operation: str = "rms_norm") -> Array:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight

    x (..., E); weight (E,); result in x's type. Pure. Raises ShapeError if weight is not (E,).
    """
    check_weight(operation, x, weight, "weight")
    source, gain = computable(x, operation), run_of(widen(weight, operation))
    normed = np.empty(source.shape, source.dtype)
    num_rows, size = rows_of(source)
    addresses = (address_of(source), 0, address_of(gain), address_of(normed), 0)
    rows.rms_norm(*addresses, num_rows, size, float(eps), KINDS[source.dtype])
    return round_to(normed, x.dtype)


def rms_norm_residual(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """r = x + residual; y = rms_norm(r, weight, eps); returns (y, r). The norm reads r before r is rounded.

    x and residual (..., E) of one shape; weight (E,); both results in x's type. Pure. Raises ShapeError otherwise.
    """
    operation = "rms_norm_residual"
    if x.shape != residual.shape:
        raise ShapeError(f"{operation}: input {x.shape} and residual {residual.shape}, expected equal shapes")
    check_weight(operation, x, weight, "weight")
    source, added = computable(x, operation), computable(residual, operation)
    if source.dtype != added.dtype:
        source, added = run_of(widen(source, operation)), run_of(widen(added, operation))
    gain = run_of(widen(weight, operation))
    normed, total = np.empty(source.shape, source.dtype), np.empty(source.shape, source.dtype)
    num_rows, size = rows_of(source)
    addresses = (address_of(array) for array in (source, added, gain, normed, total))
    rows.rms_norm(*addresses, num_rows, size, float(eps), KINDS[source.dtype])
    return round_to(normed, x.dtype), round_to(total, x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, var = mean((x - mean)**2), in two passes

    x (..., E); weight, bias (E,); result in x's type. Pure. Raises ShapeError if weight or bias is not (E,).
    """
    operation = "layer_norm"
    check_weight(operation, x, weight, "weight")
    shift = None
    if bias is not None:
        check_weight(operation, x, bias, "bias")
        shift = run_of(widen(bias, operation))
    source, gain = computable(x, operation), run_of(widen(weight, operation))
    normed = np.empty(source.shape, source.dtype)
    num_rows, size = rows_of(source)
    addresses = (address_of(source), address_of(gain), 0 if shift is None else address_of(shift), address_of(normed))
    rows.layer_norm(*addresses, num_rows, size, float(eps), KINDS[source.dtype])
    return round_to(normed, x.dtype)


def softmax(x: Array, dim: int) -> Array:
    """p = exp(x - max) / sum(exp(x - max)) along `dim`; a lane of -inf only, or with NaN or +inf, is NaN

    x of rank >= 1; result in x's type. Pure. Raises ShapeError for an axis outside the rank.
    """
    if not -x.ndim <= dim < x.ndim:
        raise ShapeError(f"softmax: dim {dim} of shape {x.shape}, expected {-x.ndim} <= dim < {x.ndim}")
    lanes = computable(np.moveaxis(x, dim, -1), "softmax")
    found = np.empty(lanes.shape, lanes.dtype)
    num_rows, size = rows_of(lanes)
    rows.softmax(address_of(lanes), address_of(found), num_rows, size, KINDS[lanes.dtype])
    return round_to(run_of(np.moveaxis(found, -1, dim)), x.dtype)


def rows_of(array: Array) -> tuple[int, int]:
    """(how many rows along the last axis, how long each is)."""
    size = array.shape[-1]
    return (array.size // size if size else 0), size


def check_weight(operation: str, x: Array, weight: Array, argument: str) -> None:
    """Raises ShapeError unless x is (..., E) and weight (E,)."""
    if x.ndim == 0 or weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ShapeError(
            f"{operation}: {argument} {weight.shape} with input {x.shape}, expected input (..., E) and {argument} (E,)"
        )
