"""Bound of the rotary embedding.  Clause: PA-ROPE-1."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array


def rope_error(model: ErrorModel, first: Array, second: Array, cos: Array, sin: Array) -> Array:
    """e of (x1 c - x2 s, x2 c + x1 s), tables being inputs: gamma_2 of each line's absolute terms.

    first, second (..., D/2) the halves of x; cos, sin broadcast against them; result (..., D). Pure.
    """
    upper = np.abs(first * cos) + np.abs(second * sin)
    lower = np.abs(second * cos) + np.abs(first * sin)
    error: Array = (model.gamma(2) + model.extra) * np.concatenate([upper, lower], axis=-1)
    return error + 2.0 * model.underflow
