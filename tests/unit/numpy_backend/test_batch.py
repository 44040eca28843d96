"""Operations over lists of tensors, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.numpy_backend.batch import NumpyTensorBatchOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

BATCH, FACTORY = NumpyTensorBatchOps(), NumpyTensorFactory()


def tensor(values, dtype=DataType.FP32):
    return FACTORY.from_numpy(np.array(values, np.float32)).to_dtype(dtype)


@pytest.mark.clause("TN-BATCH-1")
def test_batch_matmul():
    a, b = [tensor([[1, 2]]), tensor([[1], [2]])], [tensor([[3], [4]]), tensor([[3, 4]])]
    assert [t.to_numpy().tolist() for t in BATCH.batch_matmul(a, b)] == [[[11]], [[3, 4], [6, 8]]]
    assert BATCH.batch_matmul([], []) == []
    with pytest.raises(InvalidParameterError, match="2 tensors in a_batch and 1 in b_batch"):
        BATCH.batch_matmul(a, b[:1])
    with pytest.raises(BackendError, match="pair 1: matmul: inner dimensions"):
        BATCH.batch_matmul(a, [b[0], tensor([[1], [2]])])
    seen = []

    class Counting(NumpyTensorOps):
        def matmul(self, a, b):
            seen.append(a)
            return super().matmul(a, b)

    NumpyTensorBatchOps(Counting()).batch_matmul(a, b)
    assert seen == a


@pytest.mark.clause("TN-BATCH-2", "TN-BATCH-3")
@given(data=st.data())
def test_stack_and_unstack(data):
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    count, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(0, len(shape)))
    sources = [data.draw(arrays.arrays(np.int16, shape)) for _ in range(count)]
    stacked = BATCH.stack([FACTORY.from_numpy(source) for source in sources], dim)
    assert stacked.to_numpy().tolist() == np.stack(sources, dim).tolist()
    assert stacked.dtype() is DataType.INT16
    pieces = BATCH.unstack(stacked, dim)
    assert [piece.to_numpy().tolist() for piece in pieces] == [source.tolist() for source in sources]
    assert all(piece.shape() == shape for piece in pieces)


@pytest.mark.clause("TN-BATCH-2", "TN-BATCH-3")
def test_stack_limits():
    a, b = tensor([1, 2]), tensor([3, 4], DataType.FP16)
    assert str(BATCH.stack([a, b], 1).dtype()) == "fp32"
    assert all(piece.shares_memory_with(a) for piece in BATCH.unstack(a, 0))
    for arguments in (([], 0), ([a], 2), ([a], -1), ([a, tensor([1])], 0)):
        with pytest.raises(BackendError, match="stack"):
            BATCH.stack(*arguments)
    for dim in (1, -1):
        with pytest.raises(BackendError, match="unstack"):
            BATCH.unstack(a, dim)
    with pytest.raises(BackendError, match="unstack"):
        BATCH.unstack(tensor(1.0), 0)


@pytest.mark.clause("TN-BATCH-4")
@pytest.mark.parametrize("dtype", DataType)
def test_pad_batch(dtype):
    a, b = tensor([[1, 1]], dtype), tensor(np.ones((2, 3)), dtype)
    padded = BATCH.pad_batch([a, b], (2, 3))
    assert [t.to_vec_f32().tolist() for t in padded] == [[1, 1, 0, 0, 0, 0], [1] * 6]
    assert all(t.dtype() is dtype for t in padded)
    assert not any(t.shares_memory_with(b) for t in padded)
    assert BATCH.pad_batch([], (2, 3)) == []
    for target in ((2, 2), (6,), (2, 3, 1)):
        with pytest.raises(BackendError, match=r"pad_batch: tensor [01]"):
            BATCH.pad_batch([a, b], target)
    assert BATCH.pad_batch([FACTORY.zeros((0,), dtype, Device.CPU)], (2,))[0].to_vec_f32().tolist() == [0, 0]
