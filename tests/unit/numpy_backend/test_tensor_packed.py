"""4-bit tensors: two elements a byte, also in views that begin inside one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx.helper
import onnx.numpy_helper
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.numpy_backend.batch import NumpyTensorBatchOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor import NumpyTensor, PackedTensor, array_of, wrap
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

OPS, FACTORY, BATCH = NumpyTensorOps(), NumpyTensorFactory(), NumpyTensorBatchOps()
FOUR_BITS = {DataType.INT4: np.dtype(ml_dtypes.int4), DataType.UINT4: np.dtype(ml_dtypes.uint4)}
BOTH = pytest.mark.parametrize("dtype", FOUR_BITS)


def packed(values, dtype=DataType.INT4):
    return FACTORY.from_numpy(np.array(values, np.int8).astype(FOUR_BITS[dtype]))


@pytest.mark.clause("TN-PACKED-1", "TN-DATA-3", "TN-DTYPE-3")
def test_two_elements_a_byte():
    t = packed([1, -2, 3])
    assert t.to_vec_u8() == bytes([0xE1, 0x03])
    assert t.storage().nbytes == 2
    assert bytes(t.data_bytes()) == bytes([0xE1, 0x03])
    assert FACTORY.zeros((3, 5), DataType.UINT4, Device.CPU).storage().nbytes == 8
    assert FACTORY.ones((2,), DataType.UINT4, Device.CPU).to_vec_u8() == b"\x11"
    assert packed([], DataType.UINT4).to_vec_u8() == b""
    assert t.size_bytes() == 3  # upstream's count: a byte an element (D-07)


@pytest.mark.clause("TN-PACKED-1")
@BOTH
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17])
def test_the_bytes_are_those_of_onnx(dtype, n):
    values = (np.arange(n) * 5) % 16 - (8 if dtype is DataType.INT4 else 0)
    kind = onnx.TensorProto.INT4 if dtype is DataType.INT4 else onnx.TensorProto.UINT4
    theirs = onnx.numpy_helper.from_array(values.astype(np.int8).astype(FOUR_BITS[dtype]), "t")
    assert theirs.data_type == kind
    t = packed(values, dtype)
    assert t.to_vec_u8() == theirs.raw_data
    back = FACTORY.from_bytes(theirs.raw_data, (n,), dtype)
    assert back.to_vec_f32().tolist() == values.tolist()


@pytest.mark.clause("TN-PACKED-2", "TN-LIKE-11")
@BOTH
def test_reading_unpacks(dtype):
    source = np.array([[1, 7], [0, 5]], np.int8).astype(FOUR_BITS[dtype])
    t = FACTORY.from_numpy(source)
    assert isinstance(t, PackedTensor)
    array = t.to_numpy()
    assert array.dtype == FOUR_BITS[dtype]
    assert array.tolist() == source.tolist()
    assert not array.flags.writeable
    assert t.to_numpy() is not array
    source[0, 0] = 3
    assert t.to_numpy().tolist() != source.tolist()
    assert array_of("linear", t).tolist() == array.tolist()
    assert repr(t) == f"NumpyTensor(shape=(2, 2), dtype={FOUR_BITS[dtype]})"
    with pytest.raises(BackendError, match="wrap"):
        NumpyTensor(source)
    assert isinstance(wrap(source), PackedTensor)


@pytest.mark.clause("TN-PACKED-3", "TN-DATA-2", "TN-LAYOUT-2")
@pytest.mark.parametrize("n", [6, 7])
def test_views_begin_and_end_inside_bytes(n):
    t = packed(range(n))
    for start in range(n + 1):
        for end in range(start, n + 1):
            view = t.view((start,), (end,))
            assert view.to_vec_f32().tolist() == list(range(start, end))
            assert view.storage() is t.storage()
            whole = start % 2 == 0 and (end % 2 == 0 or end == n)
            in_place = view.data_bytes()
            assert (in_place is not None) == (whole or start == end), (start, end)
            if in_place is not None:
                assert bytes(in_place) == view.to_vec_u8()
                assert in_place.readonly
            assert FACTORY.from_bytes(view.to_vec_u8(), (end - start,), DataType.INT4).to_vec_f32().tolist() == list(
                range(start, end)
            )
    assert OPS.transpose(packed([[1, 2], [3, 4]]), 0, 1).data_bytes() is None
    assert packed([5]).view((0,), (1,)).data_f32() is None


@pytest.mark.clause("TN-PACKED-4", "TN-MEMORY-5")
@BOTH
@given(data=st.data())
def test_a_write_through_a_view_touches_nothing_else(dtype, data):
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)))
    box = [sorted(data.draw(st.tuples(st.integers(0, d), st.integers(0, d)))) for d in shape]
    start, end = tuple(low for low, _ in box), tuple(high for _, high in box)
    turn = data.draw(st.booleans())
    t = packed(np.arange(np.prod(shape)).reshape(shape) % 7 + 1, dtype)
    expected = t.to_vec_f32().reshape(shape)
    expected[start[0] : end[0], start[1] : end[1]] = 0
    view = t.view(start, end)
    FACTORY.memory_manager().clear(OPS.transpose(view, 0, 1) if turn else view)
    assert t.to_vec_f32().reshape(shape).tolist() == expected.tolist()


@pytest.mark.clause("TN-PACKED-4", "TN-LIKE-13", "KN-WRITEKV-1")
def test_a_key_cache_of_four_bits():
    kernels = make_backend().kernel_ops().attention_ops()
    cache = packed(np.full((5, 1, 3), 7))
    kernels.write_kv(cache, packed([[[1, 2, 3]], [[-1, -2, -3]]]), [3, 0])
    assert cache.to_vec_f32().reshape(5, 3).tolist() == [[-1, -2, -3], [7] * 3, [7] * 3, [1, 2, 3], [7] * 3]
    with pytest.raises(BackendError, match="slot 5"):
        kernels.write_kv(cache, packed([[[0, 0, 0]]]), [5])
    with pytest.raises(BackendError, match="element type"):
        kernels.attention(cache, cache, cache, AttentionParams(1, 1, 3, 1.0, False))


@pytest.mark.clause("TN-PACKED-5")
@BOTH
def test_what_stays_packed(dtype):
    t = packed([[1, 2, 3], [4, 5, 6]], dtype)
    linear = make_backend().kernel_ops().linear_ops()
    for result, values in (
        (OPS.concat([t, t.view((0, 0), (1, 3))], 0), [[1, 2, 3], [4, 5, 6], [1, 2, 3]]),
        (BATCH.stack([t, t], 2), [[[1, 1], [2, 2], [3, 3]], [[4, 4], [5, 5], [6, 6]]]),
        (BATCH.pad_batch([t], (3, 4))[0], [[1, 2, 3, 0], [4, 5, 6, 0], [0] * 4]),
        (linear.embedding(t, [1, 1, 0]), [[4, 5, 6], [4, 5, 6], [1, 2, 3]]),
        (BATCH.unstack(t, 1)[1], [2, 5]),
        (BATCH.unstack(t, 0)[1], [4, 5, 6]),
        (BATCH.unstack(OPS.transpose(t, 0, 1), 0)[2], [3, 6]),
        (OPS.split(t, (2, 1), 1)[1], [[3], [6]]),
        (FACTORY.zeros_like(t), [[0] * 3] * 2),
        (FACTORY.from_tensor(OPS.transpose(t, 0, 1), Device.CPU), [[1, 4], [2, 5], [3, 6]]),
    ):
        assert isinstance(result, PackedTensor)
        assert (result.dtype(), result.to_numpy().tolist()) == (dtype, values)
    assert OPS.mul(t, FACTORY.ones((3,), DataType.FP32, Device.CPU)).to_vec_f32().tolist() == [1, 2, 3, 4, 5, 6]
    assert (t + FACTORY.ones((3,), DataType.FP16, Device.CPU)).to_vec_f32().tolist() == [2, 3, 4, 5, 6, 7]
    with pytest.raises(BackendError, match="no common element type"):
        OPS.add(t, t)


@pytest.mark.clause("TN-PACKED-3", "TN-LIKE-4")
def test_reshaping():
    t = packed(np.arange(12) % 8).reshape((3, 4))
    assert t.is_view()
    for shape in ((5,), (-1, 12), (2, 2, 3, 0)):
        with pytest.raises(BackendError, match="reshape"):
            t.reshape(shape)
    part = t.view((0, 1), (3, 3))
    assert part.reshape((3, 1, 2)).storage() is t.storage()
    assert part.reshape((6,)).storage() is not t.storage()
    assert part.reshape((6,)).to_vec_f32().tolist() == [1, 2, 5, 6, 1, 2]
    assert packed([3]).reshape(()).is_scalar()
