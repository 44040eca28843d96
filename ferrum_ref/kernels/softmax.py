"""Softmax.   Clauses: KN-SOFTMAX-1..3."""

from __future__ import annotations

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.rounding import Array, compute_dtype, round_to, widen


def softmax(x: Array, axis: int = -1, masked_lanes: str = "nan") -> Array:
    """p = exp(x - max) / sum(exp(x - max)) along `axis`          [KN-SOFTMAX-1..3]

    Any shape of rank >= 1, any float; computed in float32 at least and rounded once; the result has x's type. -inf has
    probability 0. A lane of -inf only is NaN, or zeros for masked_lanes="zeros"; NaN or +inf in a lane makes it NaN.
    Pure. Raises ShapeError for an axis outside the rank; InvalidParameterError for another `masked_lanes`.
    """
    dtype = compute_dtype("softmax", x)
    if masked_lanes not in ("nan", "zeros"):
        raise InvalidParameterError(f"softmax: masked_lanes is {masked_lanes!r}, expected 'nan' or 'zeros'")
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"softmax: axis {axis} of shape {x.shape}, expected {-x.ndim} <= axis < {x.ndim}")
    if x.size == 0:
        return x.copy()
    with np.errstate(all="ignore"):
        wide = widen(x, dtype)
        top = wide.max(axis=axis, keepdims=True)
        if masked_lanes == "zeros":
            top[top == -np.inf] = 0
        p = wide - top
        np.exp(p, out=p)
        total = np.add.reduce(p, axis=axis, keepdims=True)
        if masked_lanes == "zeros":
            total[total == 0] = 1
        p /= total
        return round_to(p, x.dtype)
