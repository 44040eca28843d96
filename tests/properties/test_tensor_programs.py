"""Random programs of views, reshapes and casts: numpy tensors against plain float64 arrays.

The model of a tensor is a float64 ndarray, made and cut by numpy itself, whatever the tensor's own type and packing;
values stay in 0 .. 7, which every type holds. So what must agree is values, shapes, strides, contiguity, what is a
view, and exactly which tensors share memory; writes through one tensor must show in all that share it and no other.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import Fp8Format
from ferrum_ref.numpy_backend.batch import NumpyTensorBatchOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

OPS, BATCH = NumpyTensorOps(), NumpyTensorBatchOps()
DIMS = st.sampled_from([3, 2, 4, 5, 1] * 5 + [0])
SHAPES = st.integers(0, 4).flatmap(lambda rank: st.tuples(*[DIMS] * rank)).filter(lambda dims: math.prod(dims) <= 60)
FOUR_BITS = (DataType.INT4, DataType.UINT4)
DTYPES = st.sampled_from(FOUR_BITS) | st.sampled_from(DataType)
MOST = 12


def interval(data, size):
    """0 <= low < high <= size: an empty tensor teaches little, and splits make enough of them."""
    low = data.draw(st.integers(0, max(size - 1, 0)))
    return low, data.draw(st.integers(min(low + 1, size), size))


def model_cast(values, dtype):
    return (values != 0).astype(np.float64) if dtype is DataType.BOOL else values.copy()


class Programs(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.factory = NumpyTensorFactory()
        self.pairs = []  # (tensor, its model, whether it must be a view)
        self.seed = 0

    def add(self, tensor, model, is_view):
        assert tensor.shape() == model.shape
        model = model if is_view else np.array(model, order="C")  # what is new is contiguous
        self.pairs.append((tensor, model, is_view))
        del self.pairs[:-MOST]

    def pick(self, data):
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))][:2]

    @initialize(shape=SHAPES, dtype=DTYPES)
    def begin(self, shape, dtype):
        self.make(shape, dtype)

    @rule(shape=SHAPES, dtype=DTYPES)
    def make(self, shape, dtype):
        self.seed += 1
        high = 2 if dtype is DataType.BOOL else 8
        model = np.random.default_rng(self.seed).integers(0, high, shape).astype(np.float64)
        self.add(self.factory.from_slice(model.reshape(-1), shape, dtype, Device.CPU), model, False)

    @rule(data=st.data())
    def view(self, data):
        tensor, model = self.pick(data)
        box = [interval(data, dim) for dim in model.shape]
        start, end = tuple(low for low, _ in box), tuple(high for _, high in box)
        self.add(tensor.view(start, end), model[(*(slice(*pair) for pair in box), ...)], True)

    @rule(data=st.data())
    def narrow(self, data):
        tensor, model = self.pick(data)
        if not model.ndim:
            return
        dim = data.draw(st.integers(0, model.ndim - 1))
        start, end = interval(data, model.shape[dim])
        self.add(self.factory.narrow(tensor, dim, start, end - start), np.split(model, [start, end], dim)[1], True)

    @rule(data=st.data())
    def reshape(self, data):
        tensor, model = self.pick(data)
        shape, rest = [], model.size
        while rest > 1 and len(shape) < 4:
            divisor = data.draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
            shape.append(divisor)
            rest //= divisor
        shape = (*shape, rest) if rest != 1 or data.draw(st.booleans()) else tuple(shape)
        new = model.reshape(shape)
        self.add(tensor.reshape(shape), new, model.size == 0 or np.shares_memory(new, model))
        with pytest.raises(BackendError):
            tensor.reshape((model.size + 1,))

    @rule(data=st.data())
    def permute(self, data):
        tensor, model = self.pick(data)
        dims = data.draw(st.permutations(range(model.ndim)))
        self.add(OPS.permute(tensor, dims), model.transpose(dims), True)

    @rule(data=st.data())
    def transpose(self, data):
        tensor, model = self.pick(data)
        if model.ndim:
            one, two = data.draw(st.tuples(*[st.integers(0, model.ndim - 1)] * 2))
            self.add(OPS.transpose(tensor, one, two), model.swapaxes(one, two), True)

    @rule(data=st.data())
    def split(self, data):
        tensor, model = self.pick(data)
        if model.ndim:
            dim = data.draw(st.integers(0, model.ndim - 1))
            cut = data.draw(st.integers(0, model.shape[dim]))
            pieces = OPS.split(tensor, (cut, model.shape[dim] - cut), dim)
            for piece, part in zip(pieces, np.split(model, [cut], dim), strict=True):
                self.add(piece, part, True)

    @rule(data=st.data())
    def unstack(self, data):
        tensor, model = self.pick(data)
        if model.ndim:
            dim = data.draw(st.integers(0, model.ndim - 1))
            for index, piece in enumerate(BATCH.unstack(tensor, dim)):
                self.add(piece, np.moveaxis(model, dim, 0)[index, ...], True)

    @rule(data=st.data())
    def contiguous(self, data):
        tensor, model = self.pick(data)
        result = tensor.contiguous()
        assert result.is_contiguous()
        if result is not tensor:
            self.add(result, model, False)

    @rule(data=st.data(), dtype=DTYPES)
    def cast(self, data, dtype):
        tensor, model = self.pick(data)
        result = tensor.to_dtype(dtype)
        assert (result is tensor) == (tensor.dtype() is dtype)
        if result is not tensor:
            assert result.dtype() is dtype
            self.add(result, model_cast(model, dtype), False)

    @rule(data=st.data(), fp8=st.sampled_from(Fp8Format))
    def cast_to_fp8(self, data, fp8):
        tensor, model = self.pick(data)
        result = tensor.to_dtype(DataType.FP8, fp8=fp8)
        assert result.fp8_format() is fp8
        if result is not tensor:
            self.add(result, model, False)

    @rule(data=st.data())
    def stack(self, data):
        tensor, model = self.pick(data)
        if model.size <= 40 and model.ndim < 5:
            dim = data.draw(st.integers(0, model.ndim))
            self.add(BATCH.stack([tensor, tensor], dim), np.stack([model, model], dim), False)

    @rule(data=st.data())
    def concat(self, data):
        tensor, model = self.pick(data)
        if model.ndim and model.size <= 40:
            dim = data.draw(st.integers(0, model.ndim - 1))
            self.add(OPS.concat([tensor, tensor], dim), np.concatenate([model, model], dim), False)

    @rule(data=st.data())
    def pad(self, data):
        tensor, model = self.pick(data)
        target = tuple(dim + data.draw(st.integers(0, 1)) for dim in model.shape)
        padded = np.zeros(target)
        padded[(*map(slice, model.shape), ...)] = model
        self.add(BATCH.pad_batch([tensor], target)[0], padded, False)

    @rule(data=st.data())
    def copy(self, data):
        tensor, model = self.pick(data)
        self.add(self.factory.from_tensor(tensor, Device.CPU), model, False)

    @rule(data=st.data())
    def through_bytes(self, data):
        tensor, model = self.pick(data)
        if tensor.fp8_format() is not Fp8Format.E5M2:
            again = self.factory.from_bytes(tensor.to_vec_u8(), tensor.shape(), tensor.dtype())
            self.add(again, model, False)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def clear(self, data):
        tensor, model = self.pick(data)
        self.factory.memory_manager().clear(tensor)
        model[...] = 0

    @invariant()
    def everything_agrees(self):
        for tensor, model, is_view in self.pairs:
            assert tensor.shape() == model.shape
            assert tensor.to_vec_f32().tolist() == model.reshape(-1).tolist()
            assert tensor.is_view() == is_view
            in_place = tensor.data_bytes()
            assert in_place is None or bytes(in_place) == tensor.to_vec_u8()
            if in_place is None:
                assert not tensor.is_contiguous() or tensor.dtype() in FOUR_BITS

    @invariant()
    def the_latest_lies_as_its_model_does(self):
        for tensor, model, _ in self.pairs[-1:]:
            assert tensor.is_contiguous() == model.flags.c_contiguous
            strides = zip(model.shape, tensor.strides(), model.strides, strict=True)
            assert not model.size or all(dim < 2 or ours == theirs // 8 for dim, ours, theirs in strides)
            for other, their_model, _ in self.pairs:
                shares = np.shares_memory(model, their_model)
                assert tensor.shares_memory_with(other) == shares == other.shares_memory_with(tensor)


@pytest.mark.clause("TN-LIKE-13", "TN-LAYOUT-2", "TN-LAYOUT-3", "TN-PACKED-3", "TN-PACKED-4", "TN-MEMORY-5")
def test_programs():
    run_state_machine_as_test(Programs, settings=settings(max_examples=60, stateful_step_count=25))


@pytest.mark.slow
@pytest.mark.clause("TN-LIKE-13", "TN-LAYOUT-2", "TN-LAYOUT-3", "TN-PACKED-3", "TN-PACKED-4", "TN-MEMORY-5")
def test_many_programs():
    run_state_machine_as_test(Programs, settings=settings(max_examples=400, stateful_step_count=50))
