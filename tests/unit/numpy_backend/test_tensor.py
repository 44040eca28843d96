"""NumpyTensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError
from ferrum_ref.interfaces.tensor import TensorLike
from ferrum_ref.numpy_backend.tensor import NumpyTensor, array_of
from ferrum_ref.types.devices import DataType, Device


def tensor(values, dtype=np.float32):
    return NumpyTensor(np.array(values, dtype))


@pytest.mark.clause("TN-LIKE-1", "TN-LIKE-5", "TN-LIKE-11")
def test_describes_its_array():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    t = NumpyTensor(array)
    assert (t.shape(), t.dtype(), t.device(), t.numel(), t.ndim()) == ((2, 3), DataType.FP32, Device.CPU, 6, 2)
    assert t.is_contiguous()
    assert not NumpyTensor(array.T).is_contiguous()
    assert t.to_numpy() is array
    assert isinstance(t, TensorLike)
    assert not hasattr(t, "__dict__")
    assert repr(t) == "NumpyTensor(shape=(2, 3), dtype=float32)"
    assert tensor(1.0).is_scalar()
    assert not tensor([1.0]).is_scalar()


@pytest.mark.clause("TN-LIKE-3", "TN-LIKE-13")
def test_view_honours_its_bounds_and_shares_memory():
    t = tensor([[1, 2], [3, 4]])
    v = t.view((0, 1), (2, 2))
    assert v.to_numpy().tolist() == [[2], [4]]  # upstream's wrapper: everything (D-11)
    assert np.shares_memory(v.to_numpy(), t.to_numpy())
    assert t.view((1, 1), (1, 2)).shape() == (0, 1)
    assert tensor(5.0).view((), ()).to_numpy() == 5
    for start, end in (((0,), (2,)), ((0, 0), (2, 3)), ((1, 0), (0, 2)), ((-1, 0), (2, 2)), ((0, 0), (2,))):
        with pytest.raises(InvalidParameterError, match="view"):
            t.view(start, end)


@pytest.mark.clause("TN-LIKE-3")
@given(st.data())
def test_view_is_a_box(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    box = [sorted(data.draw(st.tuples(st.integers(0, d), st.integers(0, d)))) for d in shape]
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    got = NumpyTensor(array).view(tuple(low for low, _ in box), tuple(high for _, high in box))
    indices = [i for i in np.ndindex(*shape) if all(low <= x < high for x, (low, high) in zip(i, box))]
    assert got.to_numpy().reshape(-1).tolist() == [int(array[i]) for i in indices]
    assert got.shape() == tuple(high - low for low, high in box)


@pytest.mark.clause("TN-LIKE-4", "TN-LIKE-13")
def test_reshape():
    t = tensor([[1, 2], [3, 4]])
    r = t.reshape((4, 1))
    assert r.to_numpy().reshape(-1).tolist() == [1, 2, 3, 4]
    assert np.shares_memory(r.to_numpy(), t.to_numpy())
    assert NumpyTensor(t.array.T).reshape((4,)).to_numpy().tolist() == [1, 3, 2, 4]
    assert tensor([7.0]).reshape(()).is_scalar()
    for shape in ((3,), (-1,), (2, -2), (-2, -2), (2, 2, 0), ()):
        with pytest.raises(BackendError, match="reshape"):
            t.reshape(shape)
    with pytest.raises(BackendError, match="reshape"):
        NumpyTensor(np.zeros((0, 3), np.float32)).reshape((-1, 3))


@pytest.mark.clause("TN-LIKE-5")
def test_the_cpu_is_the_only_device():
    t = tensor([1.0])
    assert t.to_cpu().to_numpy() is t.to_device(Device.CPU).to_numpy() is t.array
    for device in (Device.cuda(0), Device.Metal):
        with pytest.raises(DeviceError, match="expected cpu"):
            t.to_device(device)


@pytest.mark.clause("TN-DTYPE-3", "TN-LIKE-11", "TN-CAST-5")
def test_every_data_type_is_stored():
    t = tensor([0.0, 1.0, 2.5, 7.0])
    for dtype in DataType:
        converted = t.to_dtype(dtype)
        assert converted.dtype() is dtype
        expected = [0, 1, 1, 1] if dtype is DataType.BOOL else [0, 1, 2.5, 7] if dtype.is_float() else [0, 1, 2, 7]
        assert converted.to_vec_f32().tolist() == expected
        assert converted.to_dtype(dtype) is converted
    assert t.to_dtype(DataType.BF16).to_numpy().dtype == ml_dtypes.bfloat16
    assert t.to_dtype(DataType.FP8).to_numpy().dtype == ml_dtypes.float8_e4m3fn
    assert t.to_dtype(DataType.UINT4).to_numpy().dtype == ml_dtypes.uint4
    with pytest.raises(DeviceError, match="float64 has no DataType"):
        NumpyTensor(np.ones(1)).dtype()


@pytest.mark.clause("TN-CAST-1", "TN-CAST-2", "TN-CAST-3")
def test_conversions_round_and_saturate():
    t = tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 300.0, 2.5, 1e6, np.inf])
    assert t.to_dtype(DataType.BF16).to_vec_f32()[:2].tolist() == [1, 1 + 2.0**-6]
    assert t.to_dtype(DataType.INT8).to_vec_f32().tolist() == [1, 1, 127, 2, 127, 127]
    assert t.to_dtype(DataType.FP8).to_vec_f32().tolist() == [1, 1, 288, 2.5, 448, 448]
    assert t.to_dtype(DataType.FP16).to_vec_f32()[3:].tolist() == [2.5, np.inf, np.inf]
    with pytest.raises(DeviceError, match="NaN"):
        tensor([np.nan]).to_dtype(DataType.INT32)


@pytest.mark.clause("TN-LIKE-7", "TN-LIKE-8", "TN-LIKE-9")
def test_host_copies():
    t = tensor([[1, 2], [3, 4]]).to_dtype(DataType.BF16)
    assert t.to_vec_f32().tolist() == [1, 2, 3, 4]
    assert t.to_vec_u32() == [1, 2, 3, 4]
    assert t.to_dtype(DataType.UINT4).to_vec_u32() == [1, 2, 3, 4]
    assert t.argmax_last_dim_u32() == 1
    assert t.to_dtype(DataType.FP8).argmax_last_dim_u32() == 1
    assert t.to_dtype(DataType.INT4).argmax_last_dim_u32() == 1


@pytest.mark.clause("BK-NUMPY-4")
def test_foreign_tensors_are_refused():
    class Foreign:
        pass

    with pytest.raises(BackendError, match=r"linear: got a .*Foreign, expected a NumpyTensor"):
        array_of("linear", Foreign())
    with pytest.raises(TypeError):
        tensor([1.0]) + Foreign()
    assert (tensor([1.0]) + tensor([2.0, 3.0])).to_numpy().tolist() == [3, 4]

    class Derived(NumpyTensor):
        pass

    assert array_of("linear", Derived(np.ones(1))) == 1
