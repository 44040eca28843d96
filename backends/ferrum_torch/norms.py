"""Normalisations over the last axis and softmax, in float32 with one rounding.

Each function checks its operands and hands the arithmetic to `run`, which may be a compiler (`fusing`).
Clauses: BK-TORCH-8, BK-TORCH-32 (specs/backend_torch.md); KN-RMSNORM-*, KN-LAYERNORM-*, KN-SOFTMAX-* (kernels.md).
"""

from __future__ import annotations

import torch

from ferrum_ref.errors import ShapeError
from ferrum_torch.fusing import Run, as_rows, directly
from ferrum_torch.rounding import check_float, round_to, widen


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, operation: str = "rms_norm", run: Run = directly
) -> torch.Tensor:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight

    x (..., E); weight (E,); result in x's type. Pure. Raises ShapeError if weight is not (E,).
    """
    _check(operation, x, weight)
    return run(_rms_norm, as_rows(x, run), weight, eps).view(x.shape)


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, run: Run = directly
) -> tuple[torch.Tensor, torch.Tensor]:
    """r = x + residual; y = rms_norm(r, weight, eps); returns (y, r). The norm reads r before r is rounded.

    x and residual (..., E) of one shape; weight (E,); both results in x's type. Pure. Raises ShapeError otherwise.
    """
    operation = "rms_norm_residual"
    if x.shape != residual.shape:
        raise ShapeError(
            f"{operation}: input {tuple(x.shape)} and residual {tuple(residual.shape)}, expected equal shapes"
        )
    _check(operation, x, weight)
    check_float(residual, operation)
    y, total = run(_rms_norm_residual, as_rows(x, run), as_rows(residual, run), weight, eps)
    return y.view(x.shape), total.view(x.shape)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, run: Run = directly
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, var = mean((x - mean)**2), in two passes

    x (..., E); weight, bias (E,); result in x's type. Pure. Raises ShapeError if weight or bias is not (E,).
    """
    _check("layer_norm", x, weight)
    if bias is None:
        return run(_layer_norm, as_rows(x, run), weight, eps).view(x.shape)
    check_weight("layer_norm", x, bias, "bias")
    check_float(bias, "layer_norm")
    return run(_layer_norm_with_bias, as_rows(x, run), weight, bias, eps).view(x.shape)


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


def _check(operation: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    check_weight(operation, x, weight, "weight")
    check_float(x, operation)
    check_float(weight, operation)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return round_to(_normed(widen(x, "rms_norm"), widen(weight, "rms_norm"), eps), x.dtype)


def _rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    operation = "rms_norm_residual"
    total = widen(x, operation) + widen(residual, operation)
    return round_to(_normed(total, widen(weight, operation), eps), x.dtype), round_to(total, x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return round_to(_centred_and_normed(x, weight, eps), x.dtype)


def _layer_norm_with_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return round_to(_centred_and_normed(x, weight, eps) + widen(bias, "layer_norm"), x.dtype)


def _centred_and_normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = widen(x, "layer_norm")
    return _normed(wide - wide.mean(-1, keepdim=True), widen(weight, "layer_norm"), eps)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_() * weight
