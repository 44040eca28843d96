"""Activations, broadcast arithmetic and rotary embedding against float64 formulas."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import special

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(12)
SPREAD = np.concatenate([RNG.normal(size=500) * 6, np.linspace(-100, 100, 401), [0.0, -0.0, 1e-30, -1e-30]])


@pytest.mark.clause("BK-TORCH-9")
def test_silu_is_accurate_far_to_the_left(ops: Any, kernels: Any, tensor: Any, close: Any) -> None:
    x = SPREAD.astype(np.float32)
    wide = x.astype(np.float64)
    want = wide * special.expit(wide)
    roundings = 12 + np.abs(wide)  # the exponential's argument is exact; its reduction costs at most |x| units
    close(ops.silu(tensor(x)), want, 1, np.abs(want) * roundings)
    up = RNG.normal(size=x.shape).astype(np.float32)
    magnitude = np.abs(want * up) * (roundings + 1) + np.abs(up) * 2.0**-125  # a subnormal silu, multiplied
    close(kernels.activation_ops().silu_mul(tensor(x), tensor(up)), want * up, 1, magnitude)
    assert ops.silu(tensor([-90.0])).to_vec_f32()[0] < -7e-38


@pytest.mark.clause("BK-TORCH-9")
def test_silu_at_the_edges(ops: Any, kernels: Any, tensor: Any) -> None:
    got = ops.silu(tensor([-np.inf, np.inf, np.nan, 0.0, 88.0])).to_vec_f32()
    assert got[0] == 0
    assert math.copysign(1, got[0]) == -1
    assert got[1] == np.inf
    assert np.isnan(got[2])
    assert got[3:].tolist() == [0.0, 88.0]
    assert kernels.activation_ops().silu_mul(tensor([]), tensor([])).shape() == (0,)
    gate = tensor([1.0, 2.0])
    kernels.activation_ops().silu_mul(gate, gate)
    assert gate.to_vec_f32().tolist() == [1.0, 2.0]
    with pytest.raises(BackendError, match="equal shapes"):
        kernels.activation_ops().silu_mul(tensor([1.0]), tensor([1.0, 2.0]))


@pytest.mark.clause("BK-TORCH-9")
def test_gelu_is_correctly_rounded_but_for_float64s_own_error(ops: Any, kernels: Any, tensor: Any, close: Any) -> None:
    x = (SPREAD / 8).astype(np.float32)
    wide = x.astype(np.float64)
    erf_form = wide / 2 * special.erfc(-wide / math.sqrt(2))
    tanh_form = wide * special.expit(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    close(kernels.activation_ops().gelu(tensor(x)), erf_form, 1.0001)
    close(ops.gelu(tensor(x)), erf_form, 1.0001)
    close(ops.gelu(tensor(x), approximate="tanh"), tanh_form, 1.0001)
    assert np.abs(erf_form - tanh_form).max() > 1e-4  # D-14: the two forms differ
    assert ops.gelu(tensor([-np.inf, np.inf])).to_vec_f32().tolist() == [0.0, np.inf]
    with pytest.raises(InvalidParameterError, match="approximate"):
        ops.gelu(tensor([1.0]), approximate="quick")


@pytest.mark.clause("BK-TORCH-8")
def test_relu(ops: Any, tensor: Any) -> None:
    got = ops.relu(tensor([-1.0, 2.0, np.nan, -np.inf], np.float16))
    assert got.dtype() == DataType.FP16
    assert np.array_equal(got.to_vec_f32(), np.array([0, 2, np.nan, 0], np.float32), equal_nan=True)


@pytest.mark.clause("BK-TORCH-10")
def test_arithmetic_broadcasts(ops: Any, tensor: Any) -> None:
    a = RNG.normal(size=(2, 1, 3)).astype(np.float32)
    b = RNG.normal(size=(4, 1)).astype(np.float32)
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)):
        assert np.array_equal(getattr(ops, name)(tensor(a), tensor(b)).to_numpy(), function(a, b))
    quotient = ops.div(tensor([1.0, -1.0, 0.0]), tensor([0.0, 0.0, 0.0])).to_vec_f32()
    assert np.array_equal(quotient, np.array([np.inf, -np.inf, np.nan], np.float32), equal_nan=True)
    with pytest.raises(BackendError, match="do not broadcast"):
        ops.add(tensor(np.ones((2, 3))), tensor(np.ones((2, 4))))


@pytest.mark.clause("BK-TORCH-10")
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_types_mix_as_in_the_numpy_backend(factory: Any, ops: Any, name: str) -> None:
    from ferrum_ref.numpy_backend.tensor import NumpyTensor
    from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps

    types = [
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        np.int32,
        np.uint8,
        np.uint32,
        np.bool_,
    ]
    for left in types:
        for right in types:
            a, b = np.array([3, 200, 7, 1]).astype(left), np.array([1, 100, 3, 1]).astype(right)
            try:
                want = getattr(NumpyTensorOps(), name)(NumpyTensor(a), NumpyTensor(b)).to_numpy()
            except BackendError:
                with pytest.raises(BackendError):
                    getattr(ops, name)(factory.from_numpy(a), factory.from_numpy(b))
                continue
            got = getattr(ops, name)(factory.from_numpy(a), factory.from_numpy(b)).to_numpy()
            assert got.dtype == want.dtype
            assert np.array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.clause("BK-TORCH-10")
def test_concat_and_split(ops: Any, tensor: Any) -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.arange(4.0).reshape(2, 2)
    joined = ops.concat([tensor(a), tensor(b, np.float16)], 1)
    assert joined.dtype() == DataType.FP32
    assert np.array_equal(joined.to_numpy(), np.concatenate([a, b], 1))
    pieces = ops.split(joined, (3, 0, 2), 1)
    assert [piece.shape() for piece in pieces] == [(2, 3), (2, 0), (2, 2)]
    assert np.array_equal(pieces[2].to_numpy(), b)
    assert ops.concat([tensor([1, 2], np.uint32), tensor([3], np.uint32)], 0).to_vec_u32() == [1, 2, 3]
    for call in (
        lambda: ops.concat([], 0),
        lambda: ops.concat([tensor(a), tensor(b)], 0),
        lambda: ops.concat([tensor(a), tensor([1.0])], 0),
        lambda: ops.concat([tensor(a)], 2),
        lambda: ops.split(joined, (3, 1), 1),  # D-51: upstream drops the tail
        lambda: ops.split(joined, (6, -1), 1),
        lambda: ops.split(joined, (2,), -1),
        lambda: ops.transpose(joined, 0, 2),
        lambda: ops.permute(joined, (0, 0)),
        lambda: ops.permute(joined, (0,)),
    ):
        with pytest.raises(BackendError):
            call()


def rotated64(x: Any, cos: Any, sin: Any, positions: list[int]) -> np.ndarray:
    half = cos.shape[1]
    out = np.empty(x.shape, np.float64)
    for t, p in enumerate(positions):
        for i in range(half):
            a, b = np.float64(x[:, t, :, i]), np.float64(x[:, t, :, i + half])
            c, s = np.float64(cos[p, i]), np.float64(sin[p, i])
            out[:, t, :, i], out[:, t, :, i + half] = a * c - b * s, b * c + a * s
    return out


@pytest.mark.clause("BK-TORCH-8")
@pytest.mark.parametrize("positions", [[5], [3, 4, 5], [9, 0, 9], [2, 1, 0]])
def test_rotary_indexes_the_tables_by_every_position(
    kernels: Any, tensor: Any, close: Any, positions: list[int]
) -> None:
    # D-15: upstream takes positions[0] and counts on from there, so [9, 0, 9] would read rows 9, 10, 11
    x = RNG.normal(size=(2, len(positions), 3, 10)).astype(np.float32)
    cos, sin = RNG.normal(size=(2, 12, 5)).astype(np.float32)
    got = kernels.position_ops().rotary_embedding(tensor(x), tensor(cos), tensor(sin), positions)
    magnitude = np.abs(rotated64(np.abs(x), np.abs(cos), -np.abs(sin), positions))
    both = np.concatenate([magnitude[..., :5], magnitude[..., :5]], -1) + magnitude
    close(got, rotated64(x, cos, sin, positions), 2, both)
    low = tensor(x).to_dtype(DataType.BF16)
    wide = kernels.position_ops().rotary_embedding(low.to_dtype(DataType.FP32), tensor(cos), tensor(sin), positions)
    got = kernels.position_ops().rotary_embedding(low, tensor(cos), tensor(sin), np.array(positions))
    assert np.array_equal(got.to_numpy(), wide.to_dtype(DataType.BF16).to_numpy())


@pytest.mark.clause("BK-TORCH-21")
def test_rotary_refuses_bad_positions_and_shapes(kernels: Any, tensor: Any) -> None:
    x, table = tensor(np.ones((1, 2, 1, 4))), tensor(np.ones((3, 2)))
    rotate = kernels.position_ops().rotary_embedding
    for positions in ([0], [0, 1, 2]):
        with pytest.raises(BackendError, match="expected one for each"):
            rotate(x, table, table, positions)
    for positions in ([0, 3], [-1, 0]):
        with pytest.raises(InvalidParameterError, match="0 <= position < 3"):
            rotate(x, table, table, positions)
    with pytest.raises(BackendError, match="tables"):
        rotate(x, tensor(np.ones((3, 4))), table, [0, 1])
    with pytest.raises(InvalidParameterError, match="expected integers"):
        rotate(x, table, table, [0.0, 1.0])
    assert rotate(tensor(np.ones((1, 0, 1, 4))), table, table, []).shape() == (1, 0, 1, 4)
