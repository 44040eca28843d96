"""Strides, views and who shares memory with whom."""

from __future__ import annotations

import numpy as np
import pytest

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import TensorDataAccess, TensorLayout, TensorLike
from ferrum_ref.numpy_backend.batch import NumpyTensorBatchOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor import NumpyTensor
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

OPS, FACTORY, BATCH = NumpyTensorOps(), NumpyTensorFactory(), NumpyTensorBatchOps()
DTYPES = pytest.mark.parametrize("dtype", [DataType.FP32, DataType.BF16, DataType.BOOL, DataType.INT4, DataType.UINT4])


def numbered(shape, dtype=DataType.FP32):
    values = np.arange(np.prod(shape)) % 7
    return FACTORY.from_slice(values.astype(np.float32), shape, dtype, Device.CPU)


@pytest.mark.clause("TN-LAYOUT-1")
@DTYPES
def test_strides_count_elements(dtype):
    t = numbered((2, 3, 4), dtype)
    assert t.strides() == (12, 4, 1)
    assert OPS.transpose(numbered((2, 3), dtype), 0, 1).strides() == (1, 3)
    assert t.view((0, 1, 1), (2, 3, 3)).strides() == (12, 4, 1)
    assert not t.view((0, 1, 1), (2, 3, 3)).is_contiguous()
    assert t.view((1, 1, 0), (2, 3, 4)).is_contiguous()
    assert OPS.permute(t, (2, 0, 1)).strides() == (1, 12, 4)
    assert numbered((), dtype).strides() == ()


@pytest.mark.clause("TN-LAYOUT-2", "TN-LIKE-13", "TN-LIKE-4")
@DTYPES
def test_what_is_a_view(dtype):
    t = numbered((2, 4), dtype)
    views = [
        t.view((0, 1), (2, 3)),
        t.reshape((4, 2)),
        FACTORY.narrow(t, 1, 1, 2),
        FACTORY.reshape(t, (8,)),
        OPS.transpose(t, 0, 1),
        OPS.permute(t, (1, 0)),
        *OPS.split(t, (1, 3), 1),
        *BATCH.unstack(t, 1),
        OPS.transpose(t, 0, 1).view((1, 0), (3, 2)).reshape((2, 1, 2)),
    ]
    for index, view in enumerate(views):
        assert view.is_view(), index
        assert view.shares_memory_with(t), index
        assert t.shares_memory_with(view), index
        assert view.storage() is t.storage(), index
    new = [
        t,
        OPS.transpose(t, 0, 1).reshape((8,)),
        FACTORY.zeros_like(t),
        FACTORY.from_tensor(t, Device.CPU),
        OPS.concat([t, t], 0),
        BATCH.stack([t, t], 0),
        BATCH.pad_batch([t], (2, 4))[0],
        OPS.transpose(t, 0, 1).contiguous(),
        t.to_dtype(DataType.FP16),
    ]
    for index, other in enumerate(new):
        assert not other.is_view(), index
        assert other is t or not other.shares_memory_with(t), index
    assert OPS.transpose(t, 0, 1).reshape((8,)).to_vec_f32().tolist() == t.to_numpy().T.astype(float).ravel().tolist()


@pytest.mark.clause("TN-LAYOUT-3")
@DTYPES
def test_sharing_is_exact(dtype):
    t = numbered((4, 4), dtype)
    left, right = OPS.split(t, (1, 3), 1)
    assert not left.shares_memory_with(right)  # they interleave, and the last 4-bit column shares its bytes
    assert left.shares_memory_with(t.view((1, 0), (2, 1)))
    assert not t.view((0, 0), (0, 4)).shares_memory_with(t)
    assert not t.shares_memory_with(numbered((4, 4), dtype))
    assert not t.shares_memory_with(numbered((4, 4), DataType.UINT4 if dtype is DataType.FP32 else DataType.FP32))
    assert not numbered((4,), DataType.FP32).shares_memory_with(t)
    array = np.zeros(4, np.float32)
    assert NumpyTensor(array).shares_memory_with(FACTORY.from_numpy(array[2:]))
    with pytest.raises(BackendError, match="shares_memory_with"):
        t.shares_memory_with(object())


@pytest.mark.clause("TN-LAYOUT-4")
@DTYPES
def test_contiguous(dtype):
    t = numbered((2, 3), dtype)
    assert t.contiguous() is t
    turned = OPS.transpose(t, 0, 1)
    packed = turned.contiguous()
    assert packed.is_contiguous()
    assert packed.strides() == (2, 1)
    assert packed.dtype() is dtype
    assert (packed.to_numpy() == turned.to_numpy()).all()


@pytest.mark.clause("TN-LAYOUT-5")
@DTYPES
def test_what_is_new_is_contiguous(dtype):
    turned = OPS.transpose(numbered((2, 3), dtype), 0, 1)
    for result in (
        turned.to_dtype(DataType.FP16),
        OPS.concat([turned, turned], 0),
        BATCH.stack([turned, turned], 0),
        *BATCH.pad_batch([turned], (3, 2)),
        FACTORY.from_tensor(turned, Device.CPU),
        turned.reshape((2, 3)),
    ):
        assert result.is_contiguous()
        rest = result.shape()[1:]
        assert result.strides()[0] == np.prod(rest)


@pytest.mark.clause("TN-LAYOUT-2")
def test_the_protocols_are_met():
    for dtype in (DataType.FP32, DataType.INT4):
        t = numbered((1,), dtype)
        assert isinstance(t, TensorLike)
        assert isinstance(t, TensorLayout)
        assert isinstance(t, TensorDataAccess)
        assert not hasattr(t, "__dict__")
