"""Normalisations over the last axis and softmax, in float32 with one rounding.

Clauses: BK-TORCH-8 (specs/backend_torch.md), KN-RMSNORM-*, KN-LAYERNORM-*, KN-SOFTMAX-* (specs/kernels.md).
"""

from __future__ import annotations

import torch

from ferrum_ref.errors import ShapeError
from ferrum_torch.rounding import round_to, widen


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, operation: str = "rms_norm") -> torch.Tensor:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight

    x (..., E); weight (E,); result in x's type. Pure. Raises ShapeError if weight is not (E,).
    """
    check_weight(operation, x, weight, "weight")
    return round_to(_normed(widen(x, operation), widen(weight, operation), eps), x.dtype)


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """r = x + residual; y = rms_norm(r, weight, eps); returns (y, r). The norm reads r before r is rounded.

    x and residual (..., E) of one shape; weight (E,); both results in x's type. Pure. Raises ShapeError otherwise.
    """
    operation = "rms_norm_residual"
    if x.shape != residual.shape:
        raise ShapeError(
            f"{operation}: input {tuple(x.shape)} and residual {tuple(residual.shape)}, expected equal shapes"
        )
    check_weight(operation, x, weight, "weight")
    total = widen(x, operation) + widen(residual, operation)
    return round_to(_normed(total, widen(weight, operation), eps), x.dtype), round_to(total, x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, var = mean((x - mean)**2), in two passes

    x (..., E); weight, bias (E,); result in x's type. Pure. Raises ShapeError if weight or bias is not (E,).
    """
    check_weight("layer_norm", x, weight, "weight")
    if bias is not None:
        check_weight("layer_norm", x, bias, "bias")
    wide = widen(x, "layer_norm")
    centred = wide - wide.mean(-1, keepdim=True)
    y = _normed(centred, widen(weight, "layer_norm"), eps)
    return round_to(y if bias is None else y + widen(bias, "layer_norm"), x.dtype)


def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """p = exp(x - max) / sum(exp(x - max)) along `dim`; a lane of -inf only, or with NaN or +inf, is NaN

    x of rank >= 1; result in x's type. Pure. Raises ShapeError for an axis outside the rank.
    """
    if not -x.ndim <= dim < x.ndim:
        raise ShapeError(f"softmax: dim {dim} of shape {tuple(x.shape)}, expected {-x.ndim} <= dim < {x.ndim}")
    return round_to(torch.softmax(widen(x, "softmax"), dim), x.dtype)


def check_weight(operation: str, x: torch.Tensor, weight: torch.Tensor, argument: str) -> None:
    """Raises ShapeError unless x is (..., E) and weight (E,)."""
    if x.ndim == 0 or weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ShapeError(
            f"{operation}: {argument} {tuple(weight.shape)} with input {tuple(x.shape)}, "
            f"expected input (..., E) and {argument} (E,)"
        )


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_() * weight
