"""silu, silu_mul, gelu, relu."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.activation import gelu, relu, silu, silu_mul

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def silu_of(x: float) -> float:
    """x sigmoid(x), each side of 0 by the form that neither overflows nor cancels."""
    return x / (1 + math.exp(-x)) if x >= 0 else x * math.exp(x) / (1 + math.exp(x))


@pytest.mark.clause("KN-SILU-1")
def test_silu_closed_forms():
    x = np.array([0.0, math.log(3), -math.log(3)])
    np.testing.assert_allclose(silu(x), [0, 0.75 * math.log(3), -0.25 * math.log(3)], rtol=4 * 2**-53)


@pytest.mark.clause("KN-SILU-1", "KN-SILU-2")
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_within_the_rounding_bound(dtype, bounds):
    x = np.concatenate([np.linspace(-110, 110, 4001), np.linspace(-1e-3, 1e-3, 101)]).astype(dtype)
    expected = np.array([silu_of(float(a)) for a in x])
    limit = bounds(dtype)
    # exp of float32 is off by tau relatively, and by one subnormal step; x carries that step up.
    tiny = 2.0**-149 if limit.u > 2**-50 else 2.0**-1074
    e = np.abs(expected) * (limit.tau + 4 * limit.u) + np.abs(x.astype(np.float64)) * tiny
    assert (np.abs(silu(x).astype(np.float64) - expected) <= limit.stored(e, expected)).all()


@pytest.mark.clause("KN-SILU-2")
def test_silu_far_left():
    x = np.array([-90.0], np.float32)
    assert silu(x)[0] == pytest.approx(-90 * math.exp(-90), rel=1e-6)
    with np.errstate(over="ignore"):
        assert x / (1 + np.exp(-x)) == 0  # what the textbook form gives
    assert silu(np.array([-720.0]))[0] == pytest.approx(-720 * math.exp(-720), rel=1e-12)
    y = silu(np.array([-np.inf, np.inf, np.nan, -1e30, -0.0], np.float32))
    assert str(y.tolist()) == "[-0.0, inf, nan, -0.0, -0.0]"
    assert silu(np.float32(1.5).reshape(())).shape == ()


@pytest.mark.clause("KN-SILU-1")
@given(st.floats(-600, 600))
def test_silu_minus_its_mirror_is_the_identity(x):
    y = silu(np.array([x, -x]))
    assert y[0] - y[1] == pytest.approx(x, rel=8 * 2**-53, abs=1e-300)


@pytest.mark.clause("KN-SILU-1")
@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=40), st.integers(0, 39))
def test_silu_of_an_element_does_not_depend_on_its_neighbours(values, index):
    x = np.array(values, np.float32)
    index %= x.size
    alone = silu(np.full(x.size, x[index], np.float32))
    assert silu(x)[index] == alone[index]


@pytest.mark.clause("KN-SILU-1", "KN-SILU-3")
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype, bounds):
    rng = np.random.default_rng(3)
    gate, up = ((rng.standard_normal((7, 31)) * 4).astype(dtype) for _ in range(2))
    expected = np.vectorize(silu_of)(gate.astype(np.float64)) * up.astype(np.float64)
    limit = bounds(dtype)
    e = np.abs(expected) * (limit.tau + 6 * limit.u)
    assert (np.abs(silu_mul(gate, up).astype(np.float64) - expected) <= limit.stored(e, expected)).all()
    with pytest.raises(ShapeError, match="equal shapes"):
        silu_mul(gate, up[:1])


@pytest.mark.clause("KN-SILU-3")
def test_silu_mul_rounds_once():
    bf16 = ml_dtypes.bfloat16
    rng = np.random.default_rng(4)
    gate, up = (rng.standard_normal(4000).astype(bf16) for _ in range(2))
    once = np.vectorize(silu_of)(gate.astype(np.float64)) * up.astype(np.float64)
    twice = np.vectorize(silu_of)(gate.astype(np.float64)).astype(bf16).astype(np.float64) * up.astype(np.float64)
    ours = silu_mul(gate, up)
    assert (ours == once.astype(np.float32).astype(bf16)).mean() > 0.999
    assert (ours == twice.astype(np.float32).astype(bf16)).mean() < 0.9


@pytest.mark.clause("KN-GELU-1", "KN-GELU-2")
def test_gelu_at_two():
    two = np.array([2.0])
    assert gelu(two)[0] == pytest.approx(1.9544997361036416, rel=4 * 2**-53)
    assert gelu(two, "tanh")[0] == pytest.approx(1.9545976940877752, rel=4 * 2**-53)
    assert abs(gelu(two)[0] - gelu(two, "tanh")[0]) > 9e-5


@pytest.mark.clause("KN-GELU-1", "KN-GELU-2")
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_agrees_with_torch_in_float64(form, dtype, bounds):
    torch = pytest.importorskip("torch")
    x = np.linspace(-5, 5, 2001).astype(dtype)
    expected = torch.nn.functional.gelu(torch.from_numpy(x.astype(np.float64)), approximate=form).numpy()
    # torch evaluates 1 + erf and 1 + tanh, which cancel: its own error is 2 units of |x|.
    e = np.abs(x.astype(np.float64)) * 4 * 2.0**-53 + 16 * 2.0**-53 * np.abs(expected)
    assert (np.abs(gelu(x, form).astype(np.float64) - expected) <= bounds(dtype).stored(e, expected)).all()


@pytest.mark.clause("KN-GELU-3")
def test_gelu_keeps_relative_accuracy_on_the_left():
    x = np.linspace(-37, -1, 401)
    expected = np.array([0.5 * t * math.erfc(-t / math.sqrt(2)) for t in x])
    np.testing.assert_allclose(gelu(x), expected, rtol=1e-12)
    z = [math.sqrt(2 / math.pi) * (t + 0.044715 * t**3) for t in (-3.0, -6.0, -12.0)]
    expected = [t / (1 + math.exp(-2 * a)) for t, a in zip((-3.0, -6.0, -12.0), z)]
    np.testing.assert_allclose(gelu(np.array([-3.0, -6.0, -12.0]), "tanh"), expected, rtol=1e-12)
    # Where 1 + tanh has lost every digit:
    assert 0.5 * -12.0 * (1 + math.tanh(z[2])) == 0 > expected[2]


@pytest.mark.clause("KN-GELU-2", "KN-GELU-3")
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_specials(form):
    y = gelu(np.array([-np.inf, np.inf, np.nan, -1e30, 0.0], np.float32), form)
    assert str(y.tolist()) == "[-0.0, inf, nan, -0.0, 0.0]"
    assert gelu(np.float32(-np.inf).reshape(()), form).shape == ()
    with pytest.raises(InvalidParameterError, match="approximate is 'fast'"):
        gelu(np.ones(1), "fast")


@pytest.mark.clause("KN-RELU-1")
def test_relu():
    for dtype in DTYPES:
        x = np.array([-1.5, 0.0, 2.5, np.nan, -np.inf, np.inf]).astype(dtype)
        y = relu(x)
        assert y.dtype == dtype
        assert str(y.astype(float).tolist()) == "[0.0, 0.0, 2.5, nan, 0.0, inf]"
