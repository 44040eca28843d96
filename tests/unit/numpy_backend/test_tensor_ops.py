"""NumpyTensorOps."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError
from ferrum_ref.numpy_backend.tensor import NumpyTensor, wrap
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps

OPS = NumpyTensorOps()
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


def tensor(values, dtype=np.float32):
    return wrap(np.array(values).astype(dtype))


@pytest.mark.clause("TN-OPS-1")
def test_matmul_does_not_transpose_and_broadcasts():
    a, b = [[1, 2], [3, 4]], [[5, 6], [7, 8]]
    assert OPS.matmul(tensor(a), tensor(b)).to_numpy().tolist() == [[19, 22], [43, 50]]
    batch = np.random.default_rng(0).integers(-5, 5, (4, 1, 2, 3)), np.random.default_rng(1).integers(-5, 5, (6, 3, 2))
    product = OPS.matmul(tensor(batch[0], BF16), tensor(batch[1], BF16))
    assert product.to_numpy().astype(float).tolist() == (batch[0] @ batch[1]).tolist()
    assert str(OPS.matmul(tensor(a, np.float16), tensor(b, BF16)).dtype()) == "fp32"
    long = np.ones((1, 5000))
    assert OPS.matmul(tensor(long, np.float16), tensor(long.T, np.float16)).to_vec_f32().tolist() == [5000]


@pytest.mark.clause("TN-OPS-1")
def test_matmul_refuses():
    for a, b in (((3,), (3, 2)), ((2, 3), (2, 3)), ((2, 2, 3), (3, 3, 2))):
        with pytest.raises(BackendError, match="matmul"):
            OPS.matmul(tensor(np.ones(a)), tensor(np.ones(b)))
    with pytest.raises(BackendError, match="int32"):
        OPS.matmul(tensor([[1]], np.int32), tensor([[1]], np.int32))


@pytest.mark.clause("TN-OPS-2", "TN-OPS-3")
@pytest.mark.parametrize("name", ARITHMETIC)
@given(
    st.sampled_from([((2, 3), (3,)), ((3, 1), (1, 4)), ((), (2,)), ((0,), (1,)), ((2, 2), (2, 2))]), st.integers(0, 99)
)
def test_arithmetic_broadcasts_and_rounds_once(name, shapes, seed):
    rng = np.random.default_rng(seed)
    for dtype in (np.float32, np.float16, BF16):
        a, b = (rng.uniform(0.5, 2, shape).astype(dtype) for shape in shapes)
        exact = ARITHMETIC[name](a.astype(np.float64), b.astype(np.float64))
        got = getattr(OPS, name)(NumpyTensor(a), NumpyTensor(b)).to_numpy()
        assert got.dtype == dtype
        assert got.shape == exact.shape
        # float64 holds the exact sum, difference and product of these, and the quotient to 2**-53.
        unit = {np.float32: 2.0**-24, np.float16: 2.0**-11, BF16: 2.0**-8}[dtype]
        assert (np.abs(got.astype(np.float64) - exact) <= np.abs(exact) * unit * (1 + 2.0**-10)).all()


@pytest.mark.clause("TN-OPS-2")
def test_a_row_is_added_to_every_row():
    assert OPS.add(tensor([[1, 2], [3, 4]]), tensor([10, 20])).to_numpy().tolist() == [[11, 22], [13, 24]]  # D-51
    for name in ARITHMETIC:
        with pytest.raises(BackendError, match=rf"{name}: shapes \(2,\) and \(3,\) do not broadcast"):
            getattr(OPS, name)(tensor([1, 2]), tensor([1, 2, 3]))
        with pytest.raises(BackendError, match="do not broadcast"):
            getattr(OPS, name)(tensor([1, 2], BF16), tensor([1, 2, 3], BF16))


@pytest.mark.clause("TN-OPS-3", "TN-DTYPE-2")
@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        *((np.float16, BF16, "fp32"), (np.float32, BF16, "fp32"), (FP8, BF16, "bf16"), (FP8, np.float16, "fp16")),
        *((np.int32, np.float16, "fp16"), (np.bool_, BF16, "bf16"), (ml_dtypes.int4, BF16, "bf16")),
        *(
            (np.int8, np.int8, "int8"),
            (np.int8, np.uint8, "int16"),
            (np.uint16, np.int16, "int32"),
            (np.bool_, np.int8, "int8"),
        ),
        *((np.uint32, np.uint8, "uint32"), (FP8, FP8, "fp8")),
    ],
)
def test_common_types(a, b, common):
    for x, y in ((a, b), (b, a)):
        total = OPS.add(tensor([1], x), tensor([1], y))
        assert str(total.dtype()) == common
        assert total.to_vec_f32().tolist() == [2]


@pytest.mark.clause("TN-OPS-3", "TN-DTYPE-2")
def test_integers():
    assert OPS.add(tensor([127], np.int8), tensor([1], np.int8)).to_numpy().tolist() == [-128]
    assert OPS.mul(tensor([2**31], np.uint32), tensor([2], np.uint32)).to_numpy().tolist() == [0]
    quotient = OPS.div(tensor([1, 2**31 - 1], np.int32), tensor([3, 1], np.int32))
    assert (str(quotient.dtype()), quotient.to_numpy().tolist()) == ("fp32", [float(np.float32(1 / 3)), 2.0**31])
    # 2**24 + 1 meets a float exactly and is rounded with the sum.
    assert OPS.add(tensor([2**24 + 1], np.int32), tensor([1.0])).to_numpy().tolist() == [2**24 + 2]
    for a, b in ((np.int32, np.uint32), (np.bool_, np.bool_), (ml_dtypes.int4, ml_dtypes.int4), (np.int8, np.uint32)):
        with pytest.raises(BackendError, match="no common element type"):
            OPS.add(tensor([1], a), tensor([1], b))


@pytest.mark.clause("TN-OPS-4")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_ieee_without_warnings(dtype):
    with np.errstate(over="ignore"):
        x, zero, big = (tensor(v, dtype) for v in ([1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [6e4, 3e38, -3e38]))
    assert str(OPS.div(x, zero).to_vec_f32().tolist()) == "[inf, nan, -inf]"
    assert not np.isnan(OPS.mul(big, big).to_vec_f32()).any()
    OPS.add(big, big), OPS.sub(big, big), OPS.matmul(OPS.mul(big, big).reshape((3, 1)), zero.reshape((1, 3)))


@pytest.mark.clause("TN-OPS-5")
def test_softmax():
    x = tensor([[0.0, math.log(3)], [-np.inf, -np.inf]])
    np.testing.assert_allclose(OPS.softmax(x, -1).to_numpy()[0], [0.25, 0.75], rtol=4 * 2**-24)
    assert np.isnan(OPS.softmax(x, 1).to_numpy()[1]).all()
    assert OPS.softmax(x, -1, masked_lanes="zeros").to_numpy()[1].tolist() == [0, 0]
    assert OPS.softmax(x, 0).to_numpy().tolist() == [[1, 1], [0, 0]]
    with pytest.raises(BackendError):
        OPS.softmax(x, 2)


@pytest.mark.clause("TN-OPS-6")
def test_norms():
    y = OPS.rms_norm(tensor([3.0, 4.0]), tensor([1.0, 2.0]), 0.0).to_numpy()
    np.testing.assert_allclose(y, np.array([3, 8]) / math.sqrt(12.5), rtol=4 * 2**-24)
    assert OPS.layer_norm(tensor([1.0, 3.0]), tensor([2.0, 2.0]), tensor([1.0, 0.0]), 0.0).to_numpy().tolist() == [
        -1,
        2,
    ]
    assert OPS.layer_norm(tensor([1.0, 3.0]), tensor([2.0, 2.0]), None, 0.0).to_numpy().tolist() == [-2, 2]


@pytest.mark.clause("TN-OPS-7")
def test_activations():
    x = tensor([2.0, -2.0, 0.0])
    assert OPS.relu(x).to_numpy().tolist() == [2, 0, 0]
    silu = [2 / (1 + math.exp(-2)), -2 / (1 + math.exp(2)), 0]
    np.testing.assert_allclose(OPS.silu(x).to_numpy(), silu, rtol=8 * 2**-24)
    erf = [1 + math.erf(math.sqrt(2)), -1 + math.erf(math.sqrt(2)), 0]
    np.testing.assert_allclose(OPS.gelu(x).to_numpy(), erf, rtol=2**-24)
    z = math.sqrt(2 / math.pi) * (2 + 0.044715 * 8)
    tanh = [1 + math.tanh(z), -1 + math.tanh(z), 0]
    np.testing.assert_allclose(OPS.gelu(x, approximate="tanh").to_numpy(), tanh, rtol=2**-24)


@pytest.mark.clause("TN-OPS-8")
def test_concat():
    a, b = tensor([[1, 2]]), tensor([[3, 4], [5, 6]], BF16)
    joined = OPS.concat([a, b], 0)
    assert (joined.to_numpy().tolist(), str(joined.dtype())) == ([[1, 2], [3, 4], [5, 6]], "fp32")
    assert OPS.concat([a, a, a], 1).shape() == (1, 6)
    alone = OPS.concat([a], 0)
    alone.to_numpy()[0, 0] = 9
    assert a.to_numpy()[0, 0] == 1
    for tensors, dim in (([], 0), ([a, b], 1), ([a, tensor([1.0])], 0), ([a], 2), ([a], -1)):
        with pytest.raises(BackendError, match="concat"):
            OPS.concat(tensors, dim)


@pytest.mark.clause("TN-OPS-9", "TN-LIKE-13")
def test_split():
    x = tensor(np.arange(6).reshape(2, 3))
    one, none, two = OPS.split(x, (1, 0, 2), 1)
    assert (one.to_numpy().tolist(), none.shape(), two.to_numpy().tolist()) == ([[0], [3]], (2, 0), [[1, 2], [4, 5]])
    assert np.shares_memory(two.to_numpy(), x.to_numpy())
    for sizes, dim in (((1, 1), 1), ((2, 2), 1), ((4, -1), 1), ((), 0), ((2,), 2)):  # upstream drops the tail of (1, 1)
        with pytest.raises(BackendError, match="split"):
            OPS.split(x, sizes, dim)


@pytest.mark.clause("TN-OPS-8", "TN-OPS-9")
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 2))
def test_concat_undoes_split(sizes, dim):
    shape = [2, 2, 2]
    shape[dim] = sum(sizes)
    x = tensor(np.random.default_rng(0).standard_normal(shape))
    assert (OPS.concat(OPS.split(x, sizes, dim), dim).to_numpy() == x.to_numpy()).all()


@pytest.mark.clause("TN-OPS-10", "TN-OPS-11", "TN-LIKE-13")
def test_transpose_and_permute():
    x = tensor(np.arange(24).reshape(2, 3, 4))
    t = OPS.transpose(x, 0, 2)
    assert t.shape() == (4, 3, 2)
    assert t.to_numpy()[3, 1, 0] == x.to_numpy()[0, 1, 3]
    assert np.shares_memory(t.to_numpy(), x.to_numpy())
    p = OPS.permute(x, (1, 2, 0))
    assert p.shape() == (3, 4, 2)
    assert p.to_numpy()[2, 3, 1] == x.to_numpy()[1, 2, 3]
    for dims in ((0, 1), (0, 1, 1), (0, 1, 3), (-1, 0, 1)):
        with pytest.raises(BackendError, match="permute"):
            OPS.permute(x, dims)
    for pair in ((0, 3), (-1, 0)):
        with pytest.raises(BackendError, match="transpose"):
            OPS.transpose(x, *pair)
