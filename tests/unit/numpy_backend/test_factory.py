"""NumpyTensorFactory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.types.devices import DataType, Device

CPU, FP32, BF16 = Device.CPU, DataType.FP32, DataType.BF16


@pytest.fixture
def factory():
    return NumpyTensorFactory()


@pytest.mark.clause("TN-FACTORY-1", "TN-DTYPE-3")
@pytest.mark.parametrize("dtype", DataType)
def test_filled(factory, dtype):
    for make, value in ((factory.zeros, 0), (factory.ones, 1), (factory.empty, 0)):
        t = make((2, 0, 3), dtype, CPU)
        assert (t.shape(), t.dtype()) == ((2, 0, 3), dtype)
        assert make((2, 2), dtype, CPU).to_vec_f32().tolist() == [value] * 4
        assert factory.zeros_like(make((2, 2), dtype, CPU)).to_vec_f32().tolist() == [0] * 4
        with pytest.raises(BackendError, match="dims of 0 or more"):
            make((2, -1), dtype, CPU)
    assert factory.zeros_like(factory.ones((3,), dtype, CPU)).dtype() is dtype


@pytest.mark.clause("TN-FACTORY-2")
def test_from_slice(factory):
    t = factory.from_slice([1, 2.5, 3, 1 + 2.0**-8], (2, 2), BF16, CPU)
    assert t.to_numpy().tolist() == [[1, 2.5], [3, 1]]
    assert factory.from_slice([5], (), FP32, CPU).is_scalar()
    source = np.ones(2, np.float32)
    factory.from_slice(source, (2,), FP32, CPU).to_numpy()[0] = 9
    assert source[0] == 1
    for data, shape in (([1, 2, 3], (2, 2)), ([], (1,)), ([[1.0]], (1,))):
        with pytest.raises(BackendError, match="flat values"):
            factory.from_slice(data, shape, FP32, CPU)


@pytest.mark.clause("TN-FACTORY-7", "TN-DTYPE-3")
def test_from_numpy_wraps(factory):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint32, np.bool_):
        array = np.ones((2, 3), dtype).T
        t = factory.from_numpy(array)
        assert t.to_numpy() is array
        assert factory.from_numpy(array, CPU).dtype() is t.dtype()
    for dtype in (np.float64, np.int64, np.uint64, np.complex64, ">f4"):
        with pytest.raises(DeviceError, match="has no DataType"):
            factory.from_numpy(np.ones(2, dtype))


@pytest.mark.clause("TN-FACTORY-4")
def test_ids_are_exact(factory):
    ids = [16777217, 0, 2**32 - 1]
    for given in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint32)):
        t = factory.from_ids(given)
        assert (t.dtype(), t.shape()) == (DataType.UINT32, (3,))
        assert t.to_vec_u32() == ids
    assert factory.from_slice(ids, (3,), DataType.UINT32, CPU).to_vec_u32()[0] == 16777216  # the way through float32
    assert factory.from_ids([]).shape() == (0,)
    for bad in ([-1], [2**32], [1.0], [True], [[1]], np.array([1.5])):
        with pytest.raises(InvalidParameterError, match="from_ids"):
            factory.from_ids(bad)


@pytest.mark.clause("TN-FACTORY-5", "TN-LIKE-13")
def test_narrow_reshape_copy(factory):
    t = factory.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    piece = factory.narrow(t, 1, 1, 2)
    assert piece.to_numpy().tolist() == [[1, 2], [5, 6], [9, 10]]
    assert np.shares_memory(piece.to_numpy(), t.to_numpy())
    assert factory.narrow(t, 0, 3, 0).shape() == (0, 4)
    for arguments in ((2, 0, 1), (-1, 0, 1), (0, 2, 2), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(BackendError, match="narrow"):
            factory.narrow(t, *arguments)
    assert factory.reshape(t, (12,)).shape() == (12,)
    copy = factory.from_tensor(t, CPU)
    copy.to_numpy()[0, 0] = 99
    assert t.to_numpy()[0, 0] == 0
    assert factory.to_device(t, CPU).to_numpy() is t.to_numpy()


@pytest.mark.clause("TN-FACTORY-6")
def test_random_tensors(factory):
    n = 40000
    u = factory.uniform((n,), -2.0, 6.0, FP32, CPU).to_numpy()
    assert u.min() >= -2
    assert u.max() <= 6
    assert abs(u.mean() - 2) < 6 * (8 / 12**0.5) / n**0.5
    g = factory.normal((n,), 1.0, 3.0, FP32, CPU).to_numpy()
    assert abs(g.mean() - 1) < 6 * 3 / n**0.5
    assert abs(g.std() - 3) < 6 * 3 / (2 * n) ** 0.5
    again = NumpyTensorFactory()
    assert (again.uniform((n,), -2.0, 6.0, FP32, CPU).to_numpy() == u).all()
    assert (again.normal((n,), 1.0, 3.0, FP32, CPU).to_numpy() == g).all()
    one, two = (factory.normal((3,), 0.0, 1.0, BF16, CPU, rng=np.random.default_rng(7)).to_vec_f32() for _ in range(2))
    assert (one == two).all()
    assert factory.normal((2,), 5.0, 0.0, FP32, CPU).to_numpy().tolist() == [5, 5]
    for low, high in ((1.0, 0.0), (0.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(BackendError, match="uniform"):
            factory.uniform((2,), low, high, FP32, CPU)
    for mean, std in ((0.0, -1.0), (0.0, np.nan), (np.inf, 1.0)):
        with pytest.raises(BackendError, match="normal"):
            factory.normal((2,), mean, std, FP32, CPU)


@pytest.mark.clause("TN-LIKE-5")
def test_other_devices_are_refused(factory):
    gpu = Device.cuda(0)
    t = factory.zeros((1,), FP32, CPU)
    for call in (
        lambda: factory.zeros((1,), FP32, gpu),
        lambda: factory.ones((1,), FP32, gpu),
        lambda: factory.empty((1,), FP32, gpu),
        lambda: factory.from_slice([1], (1,), FP32, gpu),
        lambda: factory.uniform((1,), 0.0, 1.0, FP32, gpu),
        lambda: factory.normal((1,), 0.0, 1.0, FP32, gpu),
        lambda: factory.from_tensor(t, gpu),
        lambda: factory.to_device(t, gpu),
        lambda: factory.from_numpy(np.ones(1, np.float32), gpu),
        lambda: factory.from_ids([1], gpu),
    ):
        with pytest.raises(DeviceError, match="cuda:0, expected cpu"):
            call()
