"""rms_norm, rms_norm_residual, layer_norm."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.kernels.norm import layer_norm, rms_norm, rms_norm_residual

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def by_the_formula(x, w, eps):
    roots = [math.sqrt(math.fsum(float(b) ** 2 for b in row) / len(row) + eps) for row in x]
    return [[float(a) / root * float(g) for a, g in zip(row, w)] for row, root in zip(x, roots)]


@pytest.mark.clause("KN-RMSNORM-1")
def test_closed_form():
    y = rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(y, np.array([3, 8]) / math.sqrt(12.5), rtol=2**-51)


@pytest.mark.clause("KN-RMSNORM-1", "KN-RMSNORM-3")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 576, 4097])
def test_within_the_rounding_bound(dtype, size, bounds):
    rng = np.random.default_rng(size)
    x = (rng.standard_normal((3, size)) * [[1.0], [1e-3], [50.0]]).astype(dtype)
    w = rng.standard_normal(size).astype(dtype)
    y = rms_norm(x, w, 2.0**-17)
    expected = np.array(by_the_formula(x, w, 2.0**-17))
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= bounds(dtype).rms_norm(expected, size)).all()


@pytest.mark.clause("KN-RMSNORM-1")
def test_agrees_with_torch_in_float64():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 96)), rng.standard_normal(96)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (96,), torch.from_numpy(w), 1e-6).numpy()
    np.testing.assert_allclose(rms_norm(x, w, 1e-6), theirs, rtol=100 * 2**-53)


@pytest.mark.clause("KN-RMSNORM-2")
def test_eps_is_inside_the_root():
    one = np.ones(1, np.float32)
    for eps in (1e-5, 1e-12, 4.0):
        root = np.sqrt(np.array([eps], np.float32))
        assert rms_norm(root, one, eps)[0] == pytest.approx(1 / math.sqrt(2), rel=8 * 2**-24)
    assert rms_norm(np.zeros(4, np.float32), np.ones(4, np.float32), 1e-5).tolist() == [0, 0, 0, 0]
    assert np.isnan(rms_norm(np.zeros(4, np.float32), np.ones(4, np.float32), 0.0)).all()


@pytest.mark.clause("KN-RMSNORM-3")
def test_squares_beyond_the_range():
    assert rms_norm(np.array([1e20, 1.0], np.float32), np.ones(2, np.float32), 1e-5).tolist() == [0, 0]
    assert rms_norm(np.array([2.0**60] * 2, np.float32), np.ones(2, np.float32), 1e-5).tolist() == [1, 1]


@pytest.mark.clause("KN-RMSNORM-1")
@given(st.integers(-20, 20), st.integers(1, 40))
def test_scaling_by_a_power_of_two_changes_nothing_without_eps(power, size):
    x = np.random.default_rng(size).standard_normal((2, size)).astype(np.float32)
    w = np.ones(size, np.float32)
    np.testing.assert_array_equal(rms_norm(x, w, 0.0), rms_norm(x * np.float32(2.0**power), w, 0.0))


@pytest.mark.clause("KN-RMSNORM-4", "KN-LAYERNORM-3")
def test_shapes():
    x = np.ones((2, 3), np.float32)
    for bad in (np.ones(2, np.float32), np.ones((1, 3), np.float32), np.float32(1).reshape(())):
        with pytest.raises(ShapeError, match=r"rms_norm: weight"):
            rms_norm(x, bad, 1e-5)
        with pytest.raises(ShapeError, match=r"layer_norm: weight"):
            layer_norm(x, bad, None, 1e-5)
        with pytest.raises(ShapeError, match=r"layer_norm: bias"):
            layer_norm(x, np.ones(3, np.float32), bad, 1e-5)
        with pytest.raises(BackendError):
            rms_norm_residual(x, x, bad, 1e-5)
    with pytest.raises(ShapeError, match="x"):
        rms_norm(np.float32(1).reshape(()), np.float32(1).reshape(()), 0.0)
    assert rms_norm(np.ones((2, 0), np.float32), np.ones(0, np.float32), 1e-5).shape == (2, 0)
    assert rms_norm(np.ones((0, 3), np.float32), np.ones(3, np.float32), 1e-5).shape == (0, 3)
    assert layer_norm(np.ones((0, 3), np.float32), np.ones(3, np.float32), None, 1e-5).shape == (0, 3)


@pytest.mark.clause("KN-RMSNORM-5")
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(dtype, bounds):
    rng = np.random.default_rng(5)
    x, residual = (rng.standard_normal((4, 33)).astype(dtype) for _ in range(2))
    w = rng.standard_normal(33).astype(dtype)
    y, r = rms_norm_residual(x, residual, w, 2.0**-17)
    assert y.dtype == r.dtype == dtype
    total = x.astype(np.float64) + residual.astype(np.float64)
    assert (np.abs(r.astype(np.float64) - total) <= bounds(dtype).stored(bounds(dtype).u * np.abs(total), total)).all()
    expected = np.array(by_the_formula(total, w, 2.0**-17))
    size = np.abs(w.astype(np.float64)) * np.abs(total) / np.sqrt((total**2).mean(-1, keepdims=True))
    allowed = bounds(dtype).rms_norm(expected, 33) + 4 * bounds(dtype).u * size
    assert (np.abs(y.astype(np.float64) - expected) <= allowed).all()
    with pytest.raises(ShapeError, match="equal shapes"):
        rms_norm_residual(x, residual[:1], w, 1e-5)


@pytest.mark.clause("KN-RMSNORM-6")
def test_the_norm_reads_the_unrounded_sum():
    bf16 = ml_dtypes.bfloat16
    x, residual, w = (np.array(a, bf16) for a in ([256.0, 1.0], [1.0, 0.0], [2.0**7, 2.0**7]))
    y, r = rms_norm_residual(x, residual, w, 0.0)
    assert r.astype(float).tolist() == [256, 1]
    # 128 / rms is 0.7043 for [257, 1] and 0.7071 for [256, 1]: apart by more than a BF16 step.
    assert float(y[1]) == float(np.array(128 / math.sqrt((257**2 + 1) / 2), bf16))
    assert float(y[1]) != float(np.array(128 / math.sqrt((256**2 + 1) / 2), bf16))


@pytest.mark.clause("KN-LAYERNORM-1")
def test_layer_norm_closed_form():
    ones = np.ones(2)
    assert layer_norm(np.array([1.0, 3.0]), ones, None, 0.0).tolist() == [-1, 1]
    assert layer_norm(np.array([1.0, 3.0]), ones * 2, ones, 0.0).tolist() == [-1, 3]
    # Biased variance: of [0, 0, 3] it is 2, not 3.
    y = layer_norm(np.array([0.0, 0.0, 3.0]), np.ones(3), None, 0.0)
    np.testing.assert_allclose(y, np.array([-1, -1, 2]) / math.sqrt(2), rtol=4 * 2**-53)


@pytest.mark.clause("KN-LAYERNORM-1")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_agrees_with_torch(dtype, bounds):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((3, 4, 130)) + 0.5).astype(dtype)
    w, b = (rng.standard_normal(130).astype(dtype) for _ in range(2))
    wide = [torch.from_numpy(a.astype(np.float64)) for a in (x, w, b)]
    expected = torch.nn.functional.layer_norm(wide[0], (130,), wide[1], wide[2], 2.0**-17).numpy()
    limit = bounds(dtype)
    centred = np.abs(x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True))
    scale = np.abs(w.astype(np.float64)) / np.sqrt((centred**2).mean(-1, keepdims=True) + 2.0**-17)
    shift = limit.gamma(131) * np.abs(x.astype(np.float64)).mean(-1, keepdims=True) + limit.u * centred
    e = scale * shift + centred * scale * (limit.gamma(140) + 6 * limit.u) + limit.u * np.abs(expected)
    e += 2 * scale * centred * shift * scale  # the shift inside the variance
    assert (np.abs(layer_norm(x, w, b, 2.0**-17).astype(np.float64) - expected) <= limit.stored(e, expected)).all()


@pytest.mark.clause("KN-LAYERNORM-2")
def test_two_passes():
    x = np.array([4097.0, 4095.0], np.float32)
    assert layer_norm(x, np.ones(2, np.float32), None, 0.0).tolist() == [1, -1]
    one_pass = np.float32(np.mean(x * x)) - np.float32(np.mean(x)) ** 2
    assert one_pass == 0
