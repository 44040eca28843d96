"""Normalisations over the last axis.   Clauses: KN-RMSNORM-1..6, KN-LAYERNORM-1..3."""

from __future__ import annotations

import numpy as np

from ferrum_ref.errors import ShapeError
from ferrum_ref.kernels.rounding import Array, DType, compute_dtype, round_to, widen


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight          [KN-RMSNORM-1..4]

    x (..., E) any float; weight (E,). The mean is taken in float32 at least; the result has x's type. Pure.
    Raises ShapeError if weight is not (E,).  Source: Zhang & Sennrich 2019, eq. 4 (eps as in Llama: inside the root).
    """
    dtype = compute_dtype("rms_norm", x, weight)
    _check_weight("rms_norm", x, weight, "weight")
    with np.errstate(all="ignore"):
        return round_to(_rms_norm(widen(x, dtype), widen(weight, dtype), eps), x.dtype)


def rms_norm_residual(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """r = x + residual;  y = rms_norm(r, weight, eps);  returns (y, r)          [KN-RMSNORM-5..6]

    x and residual (..., E) of one shape; weight (E,). The norm reads r before r is rounded to its storage type.
    Both results have x's type. Pure. Raises ShapeError for other shapes.
    """
    dtype = compute_dtype("rms_norm_residual", x, residual, weight)
    if x.shape != residual.shape:
        raise ShapeError(f"rms_norm_residual: x {x.shape} and residual {residual.shape}, expected equal shapes")
    _check_weight("rms_norm_residual", x, weight, "weight")
    with np.errstate(all="ignore"):
        total = widen(x, dtype) + widen(residual, dtype)
        normed = _rms_norm(total, widen(weight, dtype), eps)
        return round_to(normed, x.dtype), round_to(total, x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, var = mean((x - mean)**2)          [KN-LAYERNORM-1..3]

    x (..., E) any float; weight, bias (E,); bias None means 0. Two passes, in float32 at least; the result has x's
    type. Pure. Raises ShapeError if weight or bias is not (E,).  Source: Ba, Kiros & Hinton 2016, eq. 3.
    """
    arrays = (x, weight) if bias is None else (x, weight, bias)
    dtype = compute_dtype("layer_norm", *arrays)
    _check_weight("layer_norm", x, weight, "weight")
    if bias is not None:
        _check_weight("layer_norm", x, bias, "bias")
    with np.errstate(all="ignore"):
        wide = widen(x, dtype)
        centred = wide - _mean(wide)
        y = centred * _reciprocal_root(np.vecdot(centred, centred), x.shape[-1], eps, dtype)
        y *= widen(weight, dtype)
        if bias is not None:
            y += widen(bias, dtype)
        return round_to(y, x.dtype)


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    y = x * _reciprocal_root(np.vecdot(x, x), x.shape[-1], eps, x.dtype)
    y *= weight
    return y


def _reciprocal_root(sums: Array, size: int, eps: float, dtype: DType) -> Array:
    """1 / sqrt(sums / size + eps), with a last axis of 1 appended."""
    scale = np.asarray(sums, dtype=dtype) / dtype.type(size or 1)
    scale += dtype.type(eps)
    return np.asarray(dtype.type(1) / np.sqrt(scale))[..., None]


def _mean(x: Array) -> Array:
    return np.asarray(np.add.reduce(x, axis=-1, keepdims=True) / x.dtype.type(x.shape[-1] or 1))


def _check_weight(operation: str, x: Array, weight: Array, name: str) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ShapeError(f"{operation}: {name} {weight.shape} with x {x.shape}, expected x (..., E) and {name} (E,)")
