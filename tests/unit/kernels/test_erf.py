"""erf and erfc against the C library and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.kernels.erf import erf, erfc


@pytest.mark.clause("KN-ERF-1")
def test_against_the_c_library():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-7, 27, 20001), rng.standard_normal(5000), [0.46875, 4.0, 1e-300, 5e-324, -0.0]])
    x = np.concatenate([x, np.nextafter(x[-5:], np.inf), np.nextafter(x[-5:], -np.inf)])
    theirs = np.array([math.erf(t) for t in x])
    assert (np.abs(erf(x) - theirs) <= 4 * 2**-53).all()
    small = np.abs(x) < 0.4
    assert (np.abs(erf(x) - theirs)[small] <= 4 * 2**-53 * np.abs(theirs[small])).all()
    theirs = np.array([math.erfc(t) for t in x])
    normal = theirs > 1e-300
    assert (np.abs(erfc(x) - theirs)[normal] <= 2**-49 * theirs[normal]).all()
    assert (erfc(x)[~normal] <= 1.001e-300).all()


@pytest.mark.clause("KN-ERF-1")
def test_against_forty_digits():
    mpmath = pytest.importorskip("mpmath")
    x = np.random.default_rng(1).uniform(-6, 26, 300)
    with mpmath.workdps(40):
        exact = [mpmath.erfc(mpmath.mpf(float(t))) for t in x]
        assert all(abs(mpmath.mpf(float(ours)) / e - 1) <= 2**-49 for ours, e in zip(erfc(x), exact))


@pytest.mark.clause("KN-ERF-2")
def test_specials_and_shape():
    x = np.array([[-np.inf, np.inf, np.nan], [0.0, -0.0, 30.0]])
    assert str(erfc(x).tolist()) == "[[2.0, 0.0, nan], [1.0, 1.0, 0.0]]"
    assert str(erf(x).tolist()) == "[[-1.0, 1.0, nan], [0.0, -0.0, 1.0]]"
    assert erf(np.float64(0.5)).shape == () == erfc(np.float64(0.5)).shape
    assert erfc(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.clause("KN-ERF-1")
@given(st.floats(-30, 30))
def test_reflection(x):
    assert erf(np.float64(-x)) == -erf(np.float64(x))
    assert float(erfc(np.float64(x)) + erfc(np.float64(-x))) == pytest.approx(2.0, rel=2**-51)
