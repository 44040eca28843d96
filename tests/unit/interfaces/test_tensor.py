"""Provided methods of TensorLike, and the shape helpers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, ModelError, UnsupportedError
from ferrum_ref.interfaces import tensor as contract
from ferrum_ref.interfaces.tensor import (
    TensorLike,
    TensorMemoryStats,
    are_broadcastable,
    broadcast_shapes,
    last_row_f32,
    matmul_output_shape,
)
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode

SHAPES = st.lists(st.integers(0, 4), max_size=4)


class Opaque(TensorLike):
    """The required methods only, over an array that nobody may look at."""

    __slots__ = ("dims", "element")

    def __init__(self, dims, element=DataType.FP32):
        self.dims, self.element = dims, element

    def shape(self):
        return self.dims

    def dtype(self):
        return self.element

    def device(self):
        return Device.CPU

    def is_contiguous(self):
        return True

    def view(self, start, end):
        return self

    def reshape(self, shape):
        return Opaque(shape, self.element)

    def to_cpu(self):
        return self

    def to_device(self, device):
        return self

    def to_dtype(self, dtype):
        return Opaque(self.dims, dtype)


class Visible(Opaque):
    """The same with host access: everything provided follows from `to_numpy`."""

    __slots__ = ("array",)

    def __init__(self, array):
        super().__init__(array.shape)
        self.array = array

    def to_numpy(self):
        return self.array


@pytest.mark.clause("TN-LIKE-1")
@pytest.mark.parametrize(
    ("shape", "numel", "ndim", "scalar"),
    [((), 1, 0, True), ((1,), 1, 1, False), ((2, 3), 6, 2, False), ((2, 0), 0, 2, False)],
)
def test_counts(shape, numel, ndim, scalar):
    tensor = Opaque(shape)
    assert (tensor.numel(), tensor.ndim(), tensor.is_scalar()) == (numel, ndim, scalar)
    assert isinstance(tensor, TensorLike)
    assert tensor.as_any() is tensor


@pytest.mark.clause("TN-LIKE-2")
def test_four_bit_data_is_over_counted():
    assert Opaque((10, 10), DataType.INT4).size_bytes() == 100  # packed: 50
    assert DataType.INT4.packed_bytes(100) == 50
    assert [Opaque((3,), t).size_bytes() for t in (DataType.FP32, DataType.BF16, DataType.FP8)] == [12, 6, 3]


@pytest.mark.clause("TN-LIKE-11")
def test_without_host_access():
    for method in ("to_numpy", "to_vec_f32", "to_vec_u32", "argmax_last_dim_u32"):
        with pytest.raises(ModelError, match="Opaque offers no host access"):
            getattr(Opaque((2,)), method)()


@pytest.mark.clause("TN-LIKE-7")
def test_every_row_is_returned():
    values = np.array([[1, 2], [3, 4]], np.float16)
    flat = Visible(values).to_vec_f32()
    assert flat.tolist() == [1, 2, 3, 4]  # upstream: [1, 2]
    assert flat.dtype == np.float32
    assert Visible(values.T).to_vec_f32().tolist() == [1, 3, 2, 4]
    source = np.ones(2, np.float32)
    Visible(source).to_vec_f32()[0] = 5
    assert source[0] == 1  # a copy


@pytest.mark.clause("TN-LIKE-8")
def test_ids_are_exact_or_an_error():
    assert Visible(np.array([[0, 2**24 + 1], [2**32 - 1, 7]], np.uint32)).to_vec_u32() == [0, 16777217, 4294967295, 7]
    assert Visible(np.array([3.0, 0.0], np.float16)).to_vec_u32() == [3, 0]
    assert Visible(np.array([True, False])).to_vec_u32() == [1, 0]
    for bad in (2.7, -1.0, np.nan, np.inf, 2.0**32):
        with pytest.raises(InvalidParameterError, match="element 1 is"):
            Visible(np.array([1.0, bad], np.float32)).to_vec_u32()
    with pytest.raises(InvalidParameterError, match="element 0 is -5"):
        Visible(np.array([-5, 1], np.int32)).to_vec_u32()


@pytest.mark.clause("TN-LIKE-9")
def test_argmax_takes_one_row():
    cube = np.zeros((2, 3, 2, 5), np.float32)
    cube[0, -1, -1] = [0, 7, 1, 7, 2]
    assert Visible(cube).argmax_last_dim_u32() == 1
    assert Visible(cube[:, -1]).argmax_last_dim_u32() == 1
    assert Visible(cube[:, -1, -1]).argmax_last_dim_u32() == 1
    assert Visible(cube[0, -1, -1]).argmax_last_dim_u32() == 1
    assert Visible(np.array([2, 9, 9], np.int32)).argmax_last_dim_u32() == 1
    assert Visible(np.array([-np.inf, -3.0], np.float16)).argmax_last_dim_u32() == 1


@pytest.mark.clause("TN-LIKE-9")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([5.0, np.nan, 1.0], "NaN at index 1"),
        ([-np.inf, -np.inf], "No valid tokens"),
        ([], "at least one"),
        (1.0, "at least one"),
    ],
)
def test_argmax_refuses(values, message):
    with pytest.raises(BackendError, match=message):
        Visible(np.array(values, np.float32)).argmax_last_dim_u32()


@pytest.mark.clause("TN-SHAPE-1")
def test_both_operands_batch_axes_count():
    assert matmul_output_shape((2, 3), (5, 3, 4)) == [5, 2, 4]  # upstream: [2, 4]
    assert matmul_output_shape((7, 1, 2, 3), (5, 3, 4)) == [7, 5, 2, 4]
    assert matmul_output_shape((0, 2, 3), (1, 3, 4)) == [0, 2, 4]
    with pytest.raises(BackendError, match="do not broadcast"):  # upstream: [7, 2, 4]
        matmul_output_shape((7, 2, 3), (5, 3, 4))


@pytest.mark.clause("TN-SHAPE-1")
@given(SHAPES, SHAPES, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_matmul_shape_is_numpys(a, b, m, k, n):
    x, y = np.zeros((*a, m, k)), np.zeros((*b, k, n))
    try:
        expected = list(np.matmul(x, y).shape)
    except ValueError:
        with pytest.raises(BackendError):
            matmul_output_shape(x.shape, y.shape)
    else:
        assert matmul_output_shape(x.shape, y.shape) == expected


@pytest.mark.clause("TN-SHAPE-2")
def test_matmul_shape_errors_name_both_shapes():
    for a, b in (((3,), (3, 4)), ((2, 3), (3,)), ((), ())):
        with pytest.raises(BackendError, match="ranks of at least 2"):
            matmul_output_shape(a, b)
    with pytest.raises(BackendError, match=r"3, 4 of \(2, 3\) and \(4, 5\)"):
        matmul_output_shape((2, 3), (4, 5))


@pytest.mark.clause("TN-SHAPE-3", "TN-SHAPE-4")
@given(SHAPES, SHAPES)
def test_broadcasting_is_numpys(a, b):
    try:
        expected = list(np.broadcast_shapes(tuple(a), tuple(b)))
    except ValueError:
        expected = None
    assert broadcast_shapes(a, b) == expected
    assert are_broadcastable(a, b) is (expected is not None)
    assert broadcast_shapes(b, a) == expected


@pytest.mark.clause("TN-SHAPE-3", "TN-SHAPE-4")
def test_broadcasting_where_upstream_fails():
    assert broadcast_shapes((3,), (2, 3)) == [2, 3]  # a panic in a debug build
    assert broadcast_shapes((), (2, 3)) == [2, 3]
    assert broadcast_shapes((0,), (1,)) == [0]  # [1] there
    assert broadcast_shapes((0,), (5,)) is None
    assert are_broadcastable((0,), (1,))
    assert not are_broadcastable((2,), (3,))


@pytest.mark.clause("TN-LIKE-12", "TN-LIKE-14", "TN-LIKE-7")
@pytest.mark.parametrize(
    ("shape", "row"),
    [((), [0]), ((3,), [0, 1, 2]), ((2, 2), [0, 1]), ((1, 2, 2), [2, 3]), ((2, 3, 2), [4, 5]), ((3, 0), [])],
)
def test_one_row(shape, row):
    t = Visible(np.arange(np.prod(shape), dtype=np.int16).reshape(shape))
    assert last_row_f32(t).tolist() == row
    assert last_row_f32(t).dtype == np.float32
    assert t.to_vec_f32(parity_mode=ParityMode.UPSTREAM).tolist() == row
    assert t.to_vec_f32().tolist() == list(range(t.numel()))


@pytest.mark.clause("TN-LIKE-12", "TN-LIKE-14")
def test_rows_that_do_not_exist():
    four = Visible(np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2))
    assert last_row_f32(four).tolist() == [6, 7]
    with pytest.raises(UnsupportedError, match="at most 3"):
        four.to_vec_f32(parity_mode=ParityMode.UPSTREAM)
    for shape in ((0, 3), (2, 0, 3)):
        with pytest.raises(BackendError, match="has no row"):
            last_row_f32(Visible(np.zeros(shape, np.float32)))
    with pytest.raises(ModelError, match="no host access"):
        last_row_f32(Opaque((2,)))
    copy = Visible(np.zeros(2, np.float32))
    last_row_f32(copy)[0] = 1
    assert copy.array.tolist() == [0, 0]


@pytest.mark.clause("TN-LIKE-14", "TN-LIKE-8")
def test_upstream_cuts_ids():
    t = Visible(np.array([2.7, -1, np.nan, np.inf, 1e12, 5], np.float32))
    assert t.to_vec_u32(parity_mode=ParityMode.UPSTREAM) == [2, 0, 0, 2**32 - 1, 2**32 - 1, 5]
    with pytest.raises(InvalidParameterError, match=r"element 0 is 2\.7"):
        t.to_vec_u32()
    with pytest.raises(InvalidParameterError, match="element 0 is -1"):
        Visible(np.array([-1], np.int32)).to_vec_u32(parity_mode=ParityMode.UPSTREAM)


@pytest.mark.clause("TN-SHAPE-5", "TN-SHAPE-1", "TN-SHAPE-4")
def test_upstream_shapes():
    mode = ParityMode.UPSTREAM
    assert matmul_output_shape((7, 2, 3), (5, 3, 4), parity_mode=mode) == [7, 2, 4]
    assert matmul_output_shape((2, 3), (5, 3, 4), parity_mode=mode) == [2, 4]
    assert matmul_output_shape((2, 3), (5, 3, 4)) == [5, 2, 4]
    with pytest.raises(BackendError, match="do not broadcast"):
        matmul_output_shape((7, 2, 3), (5, 3, 4))
    for shapes in (((2, 3), (4, 5)), ((3,), (3, 4))):
        with pytest.raises(BackendError, match="matmul"):
            matmul_output_shape(*shapes, parity_mode=mode)
    assert broadcast_shapes((0,), (1,), parity_mode=mode) == [1]
    assert broadcast_shapes((0, 3), (3,), parity_mode=mode) == [1, 3]
    assert broadcast_shapes((0, 3), (3,)) == [0, 3]
    assert broadcast_shapes((2, 3), (3,), parity_mode=mode) == [2, 3]
    assert broadcast_shapes((2,), (3,), parity_mode=mode) is None


@pytest.mark.clause("TN-SHAPE-6")
def test_where_the_names_are():
    upstream = (
        *("TensorLike", "TensorFactory", "TensorOps", "AsyncTensorOps", "TensorBatchOps", "TensorMemoryManager"),
        *("TensorDataAccess", "TensorMemoryStats", "TensorRef"),
    )
    for name in upstream:
        assert name in contract.__all__, name
    for name in ("matmul_output_shape", "are_broadcastable", "broadcast_shapes"):
        assert getattr(contract.utils, name) is getattr(contract, name)


@pytest.mark.clause("TN-MEMORY-1")
def test_counters_are_unsigned():
    assert TensorMemoryStats(4, 3, 2, 5).peak_memory == 5
    with pytest.raises(InvalidParameterError, match="used_memory"):
        TensorMemoryStats(4, -3, 2, 5)
    with pytest.raises(TypeError):
        TensorMemoryStats(4, 3, 2)
