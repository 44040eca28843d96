"""Normalisations and softmax against float64 formulas, with bounds counted in float32 roundings."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(11)
SHAPES = [(1, 576), (3, 5, 7), (4, 1), (2, 4096)]


def norm64(x: Any, weight: Any, eps: float) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(eps)) * np.asarray(weight, np.float64)


@pytest.mark.clause("BK-TORCH-8")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_rms_norm(kernels: Any, ops: Any, tensor: Any, close: Any, shape: tuple[int, ...], scale: float) -> None:
    x = (RNG.normal(size=shape) * scale).astype(np.float32)
    w = RNG.normal(size=shape[-1]).astype(np.float32)
    want = norm64(x, w, 1e-5)
    roundings = (shape[-1] + 4) / 2 + 6  # the mean under a root counts half; then add, rsqrt and two products
    close(kernels.norm_ops().rms_norm(tensor(x), tensor(w), 1e-5), want, roundings)
    close(ops.rms_norm(tensor(x), tensor(w), 1e-5), want, roundings)


@pytest.mark.clause("BK-TORCH-8")
def test_eps_stands_inside_the_root(kernels: Any, tensor: Any, close: Any) -> None:
    x = tensor(np.full((1, 4), 1e-3))
    want = norm64(np.full((1, 4), np.float32(1e-3)), np.ones(4), 1e-6)  # 1/sqrt(2); outside the root: 0.999
    close(kernels.norm_ops().rms_norm(x, tensor(np.ones(4)), 1e-6), want, 12)
    assert kernels.norm_ops().rms_norm(tensor([[0.0, 0.0]]), tensor([1, 1]), 0.0).to_numpy().size == 2


@pytest.mark.clause("BK-TORCH-8")
def test_residual_is_added_before_the_norm_and_rounded_after(kernels: Any, tensor: Any, close: Any) -> None:
    x, r = (RNG.normal(size=(6, 96)).astype(np.float32) for _ in range(2))
    w = RNG.normal(size=96).astype(np.float32)
    normed, total = kernels.norm_ops().rms_norm_residual(tensor(x), tensor(r), tensor(w), 1e-5)
    assert np.array_equal(total.to_numpy(), x + r)
    close(normed, norm64(x + r, w, 1e-5), 60)
    low = ml_dtypes.bfloat16
    x16, r16, w16 = (tensor(value, low) for value in (x, r, w))
    wide_sum = x16.to_vec_f32() + r16.to_vec_f32()
    unrounded = kernels.norm_ops().rms_norm(tensor(wide_sum.reshape(x.shape)), w16.to_dtype(DataType.FP32), 1e-5)
    normed, total = kernels.norm_ops().rms_norm_residual(x16, r16, w16, 1e-5)
    assert np.array_equal(normed.to_numpy(), unrounded.to_dtype(DataType.BF16).to_numpy())
    assert np.array_equal(total.to_numpy(), wide_sum.reshape(x.shape).astype(low))
    # 1 + 2**-9 rounds to 1, and the norm must still see the difference between the two elements
    a, b = tensor([[1.0, 1.0]], low), tensor([[2.0**-9, -(2.0**-7)]], low)
    normed, total = kernels.norm_ops().rms_norm_residual(a, b, tensor([1.0, 1.0], low), 0.0)
    assert total.to_vec_f32().tolist() == [1.0, float(low(1 - 2**-7))]
    want = norm64(np.array([[1 + 2**-9, 1 - 2**-7]]), np.ones(2), 0.0).astype(low)
    assert np.array_equal(normed.to_numpy(), want)


@pytest.mark.clause("BK-TORCH-8")
def test_layer_norm_is_two_pass(ops: Any, tensor: Any, close: Any) -> None:
    x = (RNG.normal(size=(3, 64)) + 1000).astype(np.float32)  # E[x**2] - mean**2 would lose every digit
    w, b = RNG.normal(size=(2, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(1e-5))
    magnitude = np.abs(w) * r * np.abs(wide).mean(-1, keepdims=True) * 3 + np.abs(centred * r * w) + np.abs(b)
    close(ops.layer_norm(tensor(x), tensor(w), tensor(b), 1e-5), centred * r * w + b, 80, magnitude)
    close(ops.layer_norm(tensor(x), tensor(w), None, 1e-5), centred * r * w, 80, magnitude)


@pytest.mark.clause("BK-TORCH-8")
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_softmax(ops: Any, tensor: Any, close: Any, dim: int) -> None:
    x = (RNG.normal(size=(3, 5, 129)) * 8).astype(np.float32)
    wide = x.astype(np.float64)
    e = np.exp(wide - wide.max(dim, keepdims=True))
    spread = np.abs(wide - wide.max(dim, keepdims=True))
    p = e / e.sum(dim, keepdims=True)
    close(ops.softmax(tensor(x), dim), p, 1, p * (x.shape[dim] + 12 + 2 * spread.max(dim, keepdims=True)))


@pytest.mark.clause("BK-TORCH-8")
def test_softmax_of_infinities(ops: Any, tensor: Any) -> None:
    inf = np.inf
    rows = ops.softmax(tensor([[0, -inf, 0], [-inf, -inf, -inf], [inf, 0, 0]]), -1).to_numpy()
    assert rows[0].tolist() == [0.5, 0.0, 0.5]
    assert np.isnan(rows[1]).all()
    assert np.isnan(rows[2]).any()
    assert ops.softmax(tensor(np.zeros((2, 0))), 1).shape() == (2, 0)


@pytest.mark.clause("BK-TORCH-8")
@pytest.mark.parametrize("name", ["FP16", "BF16", "FP8"])
def test_low_precision_is_float32_rounded_once(kernels: Any, ops: Any, tensor: Any, name: str) -> None:
    dtype = DataType[name]
    x = tensor(RNG.normal(size=(5, 48))).to_dtype(dtype)
    w = tensor(RNG.normal(size=48)).to_dtype(dtype)
    x32, w32 = x.to_dtype(DataType.FP32), w.to_dtype(DataType.FP32)
    pairs = [
        (kernels.norm_ops().rms_norm(x, w, 1e-5), kernels.norm_ops().rms_norm(x32, w32, 1e-5)),
        (ops.layer_norm(x, w, w, 1e-5), ops.layer_norm(x32, w32, w32, 1e-5)),
        (ops.softmax(x, -1), ops.softmax(x32, -1)),
    ]
    for narrow, wide in pairs:
        assert narrow.dtype() == dtype
        assert np.array_equal(narrow.to_numpy(), wide.to_dtype(dtype).to_numpy())


@pytest.mark.clause("BK-TORCH-21")
def test_bad_operands(kernels: Any, ops: Any, tensor: Any) -> None:
    x, w = tensor(np.ones((2, 4))), tensor(np.ones(4))
    for call in (
        lambda: kernels.norm_ops().rms_norm(x, tensor(np.ones(3)), 1e-5),
        lambda: kernels.norm_ops().rms_norm(x, tensor(np.ones((1, 4))), 1e-5),
        lambda: kernels.norm_ops().rms_norm(tensor(1.0), w, 1e-5),
        lambda: kernels.norm_ops().rms_norm_residual(x, w, w, 1e-5),
        lambda: kernels.norm_ops().rms_norm(tensor([[1]], np.int32), tensor([1.0]), 1e-5),
        lambda: ops.layer_norm(x, w, tensor(np.ones(5)), 1e-5),
        lambda: ops.softmax(x, 2),
        lambda: ops.softmax(tensor(1.0), 0),
    ):
        with pytest.raises(BackendError, match="expected"):
            call()
