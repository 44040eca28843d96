"""The complementary error function to float64 accuracy.   Clauses: KN-ERF-1..2.

Source: W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969), 631-637, with the
coefficients of his CALERF (SPECFUN, public domain).
"""

from __future__ import annotations

import math

import numpy as np

from ferrum_ref.kernels.rounding import FLOAT64, Array

_NEAR = 0.46875
_FAR = 4.0
# erf on [0, 0.46875]: numerator and denominator in x**2, highest power first.
_A = (
    1.85777706184603153e-1,
    3.16112374387056560e0,
    1.13864154151050156e2,
    3.77485237685302021e2,
    3.20937758913846947e3,
)
_B = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
# exp(x**2) erfc on [0.46875, 4]: in x.
_C = (
    *(2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1),
    *(2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3),
    1.23033935479799725e3,
)
_D = (
    *(1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3),
    *(3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)
# (1/sqrt(pi) - x exp(x**2) erfc) * x**2 above 4: in 1/x**2.
_P = (
    *(1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1),
    *(1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4),
)
_Q = (
    *(1.0, 2.56852019228982242e0, 1.87295284992346725e0),
    *(5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3),
)


def erf(x: Array) -> Array:
    """erf(x) = 2/sqrt(pi) * integral of exp(-t**2) from 0 to x          [KN-ERF-1]

    Any shape; computed in float64; returns float64. Odd; +-1 at +-inf; NaN stays NaN. Pure.
    """
    wide = np.asarray(x, dtype=FLOAT64)
    with np.errstate(all="ignore"):
        near = np.abs(wide) <= _NEAR
        return np.where(near, _erf_near(np.where(near, wide, 0.0)), np.copysign(1.0 - erfc(np.abs(wide)), wide))


def erfc(x: Array) -> Array:
    """erfc(x) = 1 - erf(x), with full relative accuracy in the right tail          [KN-ERF-1..2]

    Any shape; computed in float64; returns float64. 0 from about x = 26.6 on, 2 at -inf; NaN stays NaN. Pure.
    """
    wide = np.asarray(x, dtype=FLOAT64)
    y = np.abs(wide).reshape(-1)
    result = np.where(np.isnan(y), np.nan, 0.0)
    with np.errstate(all="ignore"):
        near, far = y <= _NEAR, y > _FAR
        middle = ~near & (y <= _FAR)
        if middle.any():
            t = y[middle]
            result[middle] = _exp_minus_square(t) * _horner(_C, t) / _horner(_D, t)
        if far.any():
            t = np.minimum(y[far], 1e3)
            s = 1.0 / (t * t)
            tail = (1.0 / math.sqrt(math.pi) - s * _horner(_P, s) / _horner(_Q, s)) / t
            result[far] = _exp_minus_square(t) * tail
        flat = wide.reshape(-1)
        result = np.where((flat < 0) & ~near, 2.0 - result, result)
        if near.any():
            result[near] = 1.0 - _erf_near(flat[near])
    return np.asarray(result.reshape(wide.shape))


def _erf_near(x: Array) -> Array:
    s = x * x
    return x * _horner(_A, s) / _horner(_B, s)


def _exp_minus_square(t: Array) -> Array:
    """exp(-t**2), t split at a sixteenth so that the large part of the square is exact."""
    coarse = np.trunc(t * 16.0) / 16.0
    return np.asarray(np.exp(-coarse * coarse) * np.exp(-(t - coarse) * (t + coarse)))


def _horner(coefficients: tuple[float, ...], t: Array) -> Array:
    value = np.full_like(t, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= t
        value += coefficient
    return value
