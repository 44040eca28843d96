"""Monotone rational-quadratic splines, backwards.  Clauses: FM-VITS-7 (specs/audio.md).

Source: Durkan et al. 2019, "Neural Spline Flows", equations 4 to 8; identity outside [-bound, bound].
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LEAST: Final = 1e-3  # of a bin's width and height, as a share of the interval, and of a derivative


def inverse_spline(y: Floats, widths: Floats, heights: Floats, slopes: Floats, bound: float) -> Floats:
    """x with spline(x) = y, each y with a spline of its own.  Pure.  [FM-VITS-7]

    y `[N]`; widths, heights `[N, K]` before their softmax, slopes `[N, K - 1]` before their softplus: at the inner
    knots; at the outer ones the slope is 1. In float64.
    """
    x = y.copy()
    inside = np.abs(y) <= bound
    if inside.any():
        x[inside] = _inverse(y[inside], widths[inside], heights[inside], slopes[inside], bound)
    return x


def _inverse(y: Floats, widths: Floats, heights: Floats, slopes: Floats, bound: float) -> Floats:
    """In the bin of y, with share t of its width: a t^2 + b t + c = 0."""
    across, up = _knots(widths, bound), _knots(heights, bound)
    ends = np.ones((len(y), 1))
    slope = np.concatenate([ends, _LEAST + np.logaddexp(0, slopes), ends], axis=1)
    bins = np.clip((y[:, None] >= up[:, :-1]).sum(axis=1) - 1, 0, widths.shape[1] - 1)
    row = np.arange(len(y))
    low_x, low_y = across[row, bins], up[row, bins]
    width, height = across[row, bins + 1] - low_x, up[row, bins + 1] - low_y
    left, right = slope[row, bins], slope[row, bins + 1]
    mean = height / width
    rise = y - low_y
    bend = rise * (left + right - 2 * mean)
    a, b, c = height * (mean - left) + bend, height * left - bend, -mean * rise
    root = np.sqrt(np.maximum(b**2 - 4 * a * c, 0))
    return np.asarray(2 * c / (-b - root) * width + low_x)


def _knots(raw: Floats, bound: float) -> Floats:
    """The borders of bins whose shares are softmax(raw), none below a thousandth: `[N, K + 1]` from -bound to bound."""
    shares = np.exp(raw - raw.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares = _LEAST + (1 - _LEAST * raw.shape[1]) * shares
    inner = 2 * bound * np.cumsum(shares, axis=1)[:, :-1] - bound
    ends = np.full((len(raw), 1), bound)
    return np.concatenate([-ends, inner, ends], axis=1)
