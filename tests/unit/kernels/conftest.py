"""Error bounds for the kernels' tests, written from the rounding model alone: no code of the package is used.

u is the unit roundoff of the arithmetic, gamma(n) = n u / (1 - n u) (Higham 2002, section 3.1). A result y with an
error of at most e before the store is off by at most (1 + u_s) e + u_s |y| + eta_s after it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

STORAGE = {  # unit roundoff, half the smallest subnormal
    np.dtype(np.float64): (2.0**-53, 2.0**-1075),
    np.dtype(np.float32): (2.0**-24, 2.0**-150),
    np.dtype(np.float16): (2.0**-11, 2.0**-25),
    np.dtype(ml_dtypes.bfloat16): (2.0**-8, 2.0**-134),
}


class Bounds:
    """Largest error of a float32 computation (float64 for float64 results) of one operation, per element."""

    def __init__(self, dtype) -> None:
        self.dtype = np.dtype(dtype)
        self.u = 2.0**-53 if self.dtype == np.float64 else 2.0**-24
        self.tau = 8 * self.u  # exp: 4 ulp, libm and vector libraries alike

    def gamma(self, n: int) -> float:
        return n * self.u / (1 - n * self.u)

    def stored(self, e, y):
        """The bound after the store."""
        unit, eta = STORAGE[self.dtype]
        return (1 + unit) * e + unit * np.abs(y) + eta

    def linear(self, x, w):
        return self.stored(self.gamma(x.shape[-1]) * (np.abs(x) @ np.abs(w).T), x @ w.T)

    def rms_norm(self, y, n: int):
        return self.stored(np.abs(y) * (0.5 * (self.gamma(n) + 4 * self.u) + 6 * self.u), y)

    def softmax(self, scores, p):
        e = self.u * np.abs(scores - scores.max(-1, keepdims=True)) + self.tau
        mean = (p * e).sum(-1, keepdims=True)
        return self.stored(p * (e + mean + self.gamma(scores.shape[-1]) + self.u), p)

    def attention(self, scores, magnitude, p, v, o, head_dim: int):
        """scores and magnitude = scale sum |q k| (..., Sq, Skv), p (..., Sq, Skv), v (..., Skv, D), o (..., Sq, D)."""
        top = np.where(p > 0, scores, -np.inf).max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        e = self.gamma(head_dim) * magnitude + 3 * self.u * np.abs(scores) + self.u * np.abs(scores - top) + self.tau
        e = np.where(p > 0, e, 0.0)
        spread = np.abs(v[..., None, :, :] - o[..., :, None, :])
        mixed = np.einsum("...ij,...ijd->...id", p * e, spread)
        total = np.einsum("...ij,...jd->...id", p, np.abs(v))
        return self.stored(mixed + (2 * self.gamma(p.shape[-1]) + self.tau + 4 * self.u) * total, o)


@pytest.fixture(scope="session")
def bounds():
    return Bounds
