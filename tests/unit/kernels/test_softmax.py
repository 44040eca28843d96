"""softmax."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.softmax import softmax

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.clause("KN-SOFTMAX-1")
def test_closed_form():
    p = softmax(np.array([0.0, math.log(2), math.log(5), -np.inf]))
    np.testing.assert_allclose(p, [1 / 8, 2 / 8, 5 / 8, 0], rtol=8 * 2**-53)
    np.testing.assert_allclose(
        softmax(np.array([1000.0, 999.0])), [math.e / (1 + math.e), 1 / (1 + math.e)], rtol=1e-15
    )


@pytest.mark.clause("KN-SOFTMAX-1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_within_the_rounding_bound_on_every_axis(dtype, axis, bounds):
    x = (np.random.default_rng(3).standard_normal((5, 6, 40)) * 5).astype(dtype)
    scores = np.moveaxis(x.astype(np.float64), axis, -1)
    expected = np.array([[math.exp(a - row.max()) for a in row] for row in scores.reshape(-1, scores.shape[-1])])
    expected = (expected / [[math.fsum(row)] for row in expected]).reshape(scores.shape)
    ours = np.moveaxis(softmax(x, axis).astype(np.float64), axis, -1)
    assert (np.abs(ours - expected) <= bounds(dtype).softmax(scores, expected)).all()


@pytest.mark.clause("KN-SOFTMAX-1")
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=30), st.integers(-1000, 1000))
def test_a_constant_changes_nothing_and_the_sum_is_one(values, shift):
    x = np.array(values, np.float64)
    p = softmax(x)
    np.testing.assert_array_equal(p, softmax(x + shift))  # integers: the shift is exact
    assert p.sum() == pytest.approx(1.0, rel=40 * 2**-53)
    assert (np.argsort(-p, kind="stable") == np.argsort(-x, kind="stable")).all()


@pytest.mark.clause("KN-SOFTMAX-2")
def test_masked_lanes_and_specials():
    x = np.array([[-np.inf, -np.inf], [0.0, -np.inf], [np.nan, 0.0], [np.inf, 0.0]], np.float32)
    assert str(softmax(x).tolist()) == "[[nan, nan], [1.0, 0.0], [nan, nan], [nan, 0.0]]" or np.isnan(softmax(x)[3, 0])
    p = softmax(x, masked_lanes="zeros")
    assert p[:2].tolist() == [[0, 0], [1, 0]]
    assert np.isnan(softmax(x)[[0, 0, 2, 2], [0, 1, 0, 1]]).all()
    assert np.isnan(p[2]).all()


@pytest.mark.clause("KN-SOFTMAX-3")
def test_arguments():
    x = np.ones((2, 3), np.float32)
    for axis in (2, -3):
        with pytest.raises(ShapeError, match=f"axis {axis}"):
            softmax(x, axis)
    with pytest.raises(ShapeError):
        softmax(np.float32(1).reshape(()), 0)
    with pytest.raises(InvalidParameterError, match="masked_lanes"):
        softmax(x, -1, "ones")
    assert softmax(np.empty((2, 0), np.float32)).shape == (2, 0)
