"""Activations, broadcast arithmetic and rotary embedding, in float32 with one rounding.

Each function checks its operands; chains of operations go to `run`, which may be a compiler (`fusing`).
Clauses: BK-TORCH-8..9, BK-TORCH-32 (specs/backend_torch.md); KN-SILU-*, KN-GELU-*, KN-RELU-1, KN-ROPE-* (kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints
from ferrum_ref.interfaces.tensor import are_broadcastable
from ferrum_torch.fusing import Run, as_line, directly
from ferrum_torch.integers import as_integers, is_run
from ferrum_torch.rounding import FLOATS, check_float, common_type, round_to, widen

EXP_OVERFLOWS_BELOW = -80.0  # exp(88.8) is infinite in float32, while x * exp(x) is not yet 0 there


def silu(x: torch.Tensor, run: Run = directly) -> torch.Tensor:
    """y = x * sigmoid(x); at -inf it is -0. Result in x's type. Pure."""
    check_float(x, "silu")
    return run(_silu_rounded, as_line(x, run)).view(x.shape)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, run: Run = directly) -> torch.Tensor:
    """y = silu(gate) * up, rounded once. Equal shapes; result in gate's type. Pure. Raises ShapeError otherwise."""
    if gate.shape != up.shape:
        raise ShapeError(f"silu_mul: gate {tuple(gate.shape)} and up {tuple(up.shape)}, expected equal shapes")
    check_float(gate, "silu_mul")
    check_float(up, "silu_mul")
    return run(_silu_mul_rounded, as_line(gate, run), as_line(up, run)).view(gate.shape)


def gelu(x: torch.Tensor, approximate: str = "none", run: Run = directly) -> torch.Tensor:
    """y = x/2 * erfc(-x / sqrt(2)); "tanh": y = x * sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x**3)

    Computed in float64, since 1 + erf(x) cancels for negative x; rounded once to x's type; -0 at -inf. Pure.
    Raises InvalidParameterError for another `approximate`.
    """
    check_float(x, "gelu")
    if approximate not in ("none", "tanh"):
        raise InvalidParameterError(f"gelu: approximate: got {approximate!r}, expected 'none' or 'tanh'")
    function = _gelu_rounded if approximate == "none" else _gelu_tanh_rounded
    return run(function, as_line(x, run)).view(x.shape)


def relu(x: torch.Tensor) -> torch.Tensor:
    """y = max(x, 0), exact; NaN stays NaN. Result in x's type. Pure."""
    return round_to(torch.relu(widen(x, "relu")), x.dtype)


def arithmetic(
    operation: str, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """function(a, b), broadcast (D-51), rounded once to the common type; IEEE inf and NaN, no exception. Pure.

    Integers wrap around; the quotient of two integers is fp32. Raises ShapeError for shapes that do not broadcast;
    BackendError for types without a common one.
    """
    if a.shape != b.shape and not are_broadcastable(a.shape, b.shape):
        raise ShapeError(
            f"{operation}: shapes {tuple(a.shape)} and {tuple(b.shape)} do not broadcast; "
            "expected dimensions, aligned at the right, to be equal or 1"
        )
    if a.dtype is torch.float32 and b.dtype is torch.float32:
        return function(a, b)
    target = common_type(operation, a.dtype, b.dtype)
    if target in FLOATS:
        compute = torch.float32 if a.dtype in FLOATS and b.dtype in FLOATS else torch.float64
        return round_to(function(a.to(compute), b.to(compute)), target)
    if function is torch.div:
        return (a.to(torch.float64) / b.to(torch.float64)).to(torch.float32)
    return function(a.to(torch.int64), b.to(torch.int64)).to(target)


def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: Ints, run: Run = directly
) -> torch.Tensor:
    """(a, b) -> (a c - b s, b c + a s) for every pair (x[i], x[i + D/2]) of a head, c, s = cos[p, i], sin[p, i]

    x (B, T, H, D); cos, sin (P, D/2); one position for each token, each one indexes the tables (D-15). Result in x's
    type. Pure. Raises ShapeError for other shapes; InvalidParameterError for a position outside [0, P).
    """
    operation = "rotary_embedding"
    if x.ndim != 4 or cos.ndim != 2 or cos.shape != sin.shape or x.shape[3] != 2 * cos.shape[1]:
        raise ShapeError(
            f"{operation}: x {tuple(x.shape)}, cos_cache {tuple(cos.shape)}, sin_cache {tuple(sin.shape)}; "
            "expected (B, T, H, D) and tables (P, D/2)"
        )
    index = as_integers(operation, "position_ids", positions)
    if len(index) != x.shape[1]:
        raise ShapeError(f"{operation}: {len(index)} position_ids for {x.shape[1]} tokens, expected one for each")
    if x.numel() == 0:
        return torch.empty_like(x)
    if not 0 <= int(index.min()) <= int(index.max()) < cos.shape[0]:
        bad = index[(index < 0) | (index >= cos.shape[0])]
        raise InvalidParameterError(
            f"{operation}: position_ids: got {int(bad[0])}, expected 0 <= position < {cos.shape[0]}; "
            "build longer tables or shorten the sequence"
        )
    if is_run(index):
        rows = slice(int(index[0]), int(index[-1]) + 1)
        c, s = cos[rows], sin[rows]
    else:
        chosen = torch.from_numpy(np.ascontiguousarray(index)).to(cos.device)
        c, s = cos.index_select(0, chosen), sin.index_select(0, chosen)
    for data in (x, cos, sin):
        check_float(data, operation)
    if run is not directly:  # one token a row: otherwise it is compiled once more for every B and T that is 1
        c, s = (table.expand(x.shape[0], *table.shape).reshape(-1, table.shape[1]) for table in (c, s))
        return run(_rotated, x.reshape(-1, *x.shape[2:]), c, s).view(x.shape)
    return _rotated(x, c, s)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (..., T, H, D), cos and sin (T, D/2)."""
    operation = "rotary_embedding"
    c, s = widen(cos, operation).unsqueeze(1), widen(sin, operation).unsqueeze(1)
    a, b = widen(x, operation).tensor_split(2, -1)
    turned = torch.cat((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s)), -1)
    return round_to(turned, x.dtype)


def _silu_rounded(x: torch.Tensor) -> torch.Tensor:
    return round_to(_silu(widen(x, "silu")), x.dtype)


def _silu_mul_rounded(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return round_to(_silu(widen(gate, "silu_mul")).mul_(widen(up, "silu_mul")), gate.dtype)


def _gelu_rounded(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float64)
    return _rounded_gelu(wide, wide * 0.5 * torch.special.erfc(wide * -math.sqrt(0.5)), x.dtype)


def _gelu_tanh_rounded(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float64)
    y = wide * torch.sigmoid(wide * (1.0 + 0.044715 * wide * wide) * (2.0 * math.sqrt(2.0 / math.pi)))
    return _rounded_gelu(wide, y, x.dtype)


def _rounded_gelu(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return round_to(y.masked_fill_(x == -torch.inf, -0.0), dtype)


def _silu(x: torch.Tensor) -> torch.Tensor:
    """A fresh float32 tensor: x / (1 + exp(-x)), by a form that does not overflow where some x is far below 0."""
    if not torch.compiler.is_compiling() and x.is_cpu and (x.numel() == 0 or float(x.amin()) >= EXP_OVERFLOWS_BELOW):
        return torch.nn.functional.silu(x)
    root = torch.exp(x.clamp(max=0.0) * 0.5)  # the exponential in two factors: neither is ever subnormal
    y = x * root * root / (1.0 + torch.exp(-x.abs()))
    return y.masked_fill_(x == -torch.inf, -0.0)
