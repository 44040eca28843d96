"""The memory manager of tensors counts what lives."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.tensor import TensorMemoryManager, TensorMemoryStats
from ferrum_ref.numpy_backend.batch import NumpyTensorBatchOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor_memory import NumpyTensorMemoryManager
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

CPU, FP32, OPS = Device.CPU, DataType.FP32, NumpyTensorOps()


@pytest.fixture
def factory():
    return NumpyTensorFactory()


def stats(manager):
    s = manager.memory_stats()
    return s.total_allocated, s.used_memory, s.active_tensors, s.peak_memory


@pytest.mark.clause("TN-MEMORY-1")
def test_bytes_live_as_long_as_a_view(factory):
    manager = factory.memory_manager()
    assert isinstance(manager, TensorMemoryManager)
    assert manager.memory_stats() == TensorMemoryStats(0, 0, 0, 0)
    a = factory.zeros((10, 10), FP32, CPU)
    b = factory.ones((5,), DataType.INT4, CPU)
    assert stats(manager) == (403, 403, 2, 403)
    row = a.view((3, 0), (4, 10)).reshape((10,))
    pieces = OPS.split(OPS.transpose(a, 0, 1), (4, 6), 0)
    entry = NumpyTensorBatchOps().unstack(row, 0)[2]
    assert stats(manager) == (403, 403, 2, 403)  # views count once
    del a, row, pieces
    assert stats(manager) == (403, 403, 2, 403)  # one entry holds all 400 bytes
    del entry
    assert stats(manager) == (3, 3, 1, 403)
    half = b.view((1,), (4,))
    del b
    assert stats(manager) == (3, 3, 1, 403)
    del half
    assert stats(manager) == (0, 0, 0, 403)


@pytest.mark.clause("TN-MEMORY-2")
def test_everything_the_factory_makes_counts(factory):
    manager = factory.memory_manager()
    rng = np.random.default_rng(0)
    base = factory.zeros((2, 3), FP32, CPU)
    made = {
        "empty": (lambda: factory.empty((3,), DataType.FP16, CPU), 6),
        "ones": (lambda: factory.ones((3,), DataType.BF16, CPU), 6),
        "zeros_like": (lambda: factory.zeros_like(base), 24),
        "from_slice": (lambda: factory.from_slice([1, 2, 3, 4], (2, 2), FP32, CPU), 16),
        "cast": (lambda: factory.from_slice([1, 2, 3], (3,), DataType.UINT4, CPU), 2),
        "uniform": (lambda: factory.uniform((4, 2), 0.0, 1.0, DataType.FP8, CPU, rng=rng), 8),
        "normal": (lambda: factory.normal((4, 2), 0.0, 1.0, FP32, CPU, rng=rng), 32),
        "from_tensor": (lambda: factory.from_tensor(base.view((0, 0), (2, 2)), CPU), 16),
        "from_ids": (lambda: factory.from_ids([1, 2]), 8),
        "from_bytes": (lambda: factory.from_bytes(b"abcd", (4,), DataType.UINT8), 4),
        "packed": (lambda: factory.from_numpy(factory.ones((7,), DataType.INT4, CPU).to_numpy()), 4),
    }
    for name, (make, num_bytes) in made.items():
        tensor = make()
        assert (name, *stats(manager)[:3]) == (name, 24 + num_bytes, 24 + num_bytes, 2)
        del tensor
    wrapped = factory.from_numpy(np.zeros(1000, np.float32))
    total = OPS.add(base, base)
    assert stats(manager)[:3] == (24, 24, 1)  # the caller's memory, and a result's
    del wrapped, total
    shared = NumpyTensorFactory(memory=manager)
    assert shared.memory_manager() is manager
    other = shared.zeros((1,), FP32, CPU)
    assert stats(manager)[:3] == (28, 28, 2)
    del other


@pytest.mark.clause("TN-MEMORY-3", "TN-MEMORY-4")
def test_preallocated_storage_is_used_again():
    manager = NumpyTensorMemoryManager()
    t = manager.preallocate((4, 4), FP32, CPU)
    assert (t.shape(), t.dtype(), t.to_vec_f32().tolist()) == ((4, 4), FP32, [0] * 16)
    t.to_numpy()[...] = 7
    address = t.to_numpy().__array_interface__["data"][0]
    view = t.view((1, 0), (2, 4))
    del t
    assert stats(manager) == (64, 64, 1, 64)
    del view
    assert stats(manager) == (64, 0, 0, 64)  # kept
    again = manager.preallocate((128,), DataType.INT4, CPU)  # another shape and type of as many bytes
    assert again.storage().__array_interface__["data"][0] == address
    assert not again.to_numpy().astype(int).any()
    assert stats(manager) == (64, 64, 1, 64)
    more = manager.preallocate((8,), DataType.BF16, CPU)
    assert stats(manager) == (80, 80, 2, 80)
    del again
    assert stats(manager) == (80, 16, 1, 80)
    manager.gc()
    assert stats(manager) == (16, 16, 1, 80)
    more.to_numpy()[...] = 3
    manager.gc()
    assert more.to_vec_f32().tolist() == [3] * 8
    empty, scalar = manager.preallocate((0, 3), FP32, CPU), manager.preallocate((), FP32, CPU)
    assert (empty.shape(), scalar.is_scalar()) == ((0, 3), True)
    assert stats(manager)[:3] == (20, 20, 3)
    for bad in ((-1,), (1.5,)):
        with pytest.raises(BackendError, match="preallocate"):
            manager.preallocate(bad, FP32, CPU)
    with pytest.raises(DeviceError, match="expected cpu"):
        manager.preallocate((1,), FP32, Device.cuda(0))


@pytest.mark.clause("TN-MEMORY-5", "TN-LIKE-13")
@pytest.mark.parametrize("dtype", DataType)
def test_clear(factory, dtype):
    manager = factory.memory_manager()
    t = factory.ones((2, 3), dtype, CPU)
    before = stats(manager)
    manager.clear(OPS.transpose(t, 0, 1).view((1, 0), (3, 2)))
    assert t.to_vec_f32().tolist() == [1, 0, 0, 1, 0, 0]
    manager.clear(t)
    assert t.to_vec_f32().tolist() == [0] * 6
    assert stats(manager) == before


@pytest.mark.clause("TN-MEMORY-5")
def test_clear_needs_memory_that_may_be_written(factory):
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    t = factory.from_numpy(array)
    with pytest.raises(BackendError, match="may not be written"):
        factory.memory_manager().clear(t)
    assert t.to_vec_f32().tolist() == [1, 1, 1]
    with pytest.raises(BackendError, match="clear: got"):
        factory.memory_manager().clear(object())
    packed = factory.ones((3,), DataType.INT4, CPU)
    packed.storage().flags.writeable = False
    with pytest.raises(BackendError, match="may not be written"):
        factory.memory_manager().clear(packed)


@pytest.mark.clause("TN-MEMORY-6")
def test_capacity():
    manager = NumpyTensorMemoryManager(capacity_bytes=100)
    factory = NumpyTensorFactory(memory=manager)
    a = factory.zeros((20,), FP32, CPU)
    for make in (
        lambda: factory.zeros((6,), FP32, CPU),
        lambda: factory.from_slice([0.0] * 6, (6,), FP32, CPU),
        lambda: manager.preallocate((6,), FP32, CPU),
    ):
        with pytest.raises(ResourceExhaustedError, match="80 of 100 in use"):
            make()
        assert stats(manager) == (80, 80, 1, 80)
    b = manager.preallocate((5,), FP32, CPU)
    del b
    assert stats(manager) == (100, 80, 1, 100)
    c = factory.zeros((4,), FP32, CPU)  # gives the kept 20 bytes back first
    assert stats(manager) == (96, 96, 2, 100)
    del a, c
    with pytest.raises(InvalidParameterError, match="capacity_bytes"):
        NumpyTensorMemoryManager(capacity_bytes=-1)


@pytest.mark.clause("TN-FACTORY-8")
def test_what_no_machine_holds(factory):
    for shape in ((2**62,), (2**40, 2**40), (2**63, 0), (0, 2**62, 2**62)):
        for make in (
            lambda shape=shape: factory.zeros(shape, FP32, CPU),
            lambda shape=shape: factory.normal(shape, 0.0, 1.0, FP32, CPU),
            lambda shape=shape: factory.memory_manager().preallocate(shape, DataType.INT4, CPU),
        ):
            with pytest.raises(ResourceExhaustedError):
                make()
    with pytest.raises(ResourceExhaustedError, match="free"):
        factory.uniform((2**60,), 0.0, 1.0, DataType.INT8, CPU)  # the draws are float64
    for shape in ((1.5,), ("3",), (None,), (True,), (1,) * 65):
        with pytest.raises(BackendError, match="zeros"):
            factory.zeros(shape, FP32, CPU)
    assert factory.zeros((np.int64(2), 1), FP32, CPU).shape() == (2, 1)
    for data in (["a"], [[1], [2, 3]], [10**400], None):
        with pytest.raises(BackendError, match="from_slice"):
            factory.from_slice(data, (1,), FP32, CPU)
    assert factory.from_slice([1e39], (1,), FP32, CPU).to_vec_f32().tolist() == [np.inf]
    assert stats(factory.memory_manager())[:3] == (0, 0, 0)


@pytest.mark.clause("TN-MEMORY-1")
def test_the_collector_may_run_at_any_moment(factory):
    manager = factory.memory_manager()

    class Knot:
        def __init__(self):
            self.tensor, self.me = factory.zeros((100,), FP32, CPU), self

    errors = []

    def work():
        try:
            for _ in range(200):
                Knot()
                manager.memory_stats()
        except Exception as error:  # noqa: BLE001 - any failure of the thread is the test's
            errors.append(error)

    threshold = gc.get_threshold()
    gc.set_threshold(3)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert not errors
    assert stats(manager)[:3] == (0, 0, 0)


class Accounting(RuleBasedStateMachine):
    """Any program of tensors, views and releases against a list of who holds which storage."""

    capacity = 600

    def __init__(self):
        super().__init__()
        self.manager = NumpyTensorMemoryManager(self.capacity)
        self.factory = NumpyTensorFactory(memory=self.manager)
        self.held = []  # (tensor, storage number)
        self.sizes = {}  # live storages: number -> (bytes, returns to the manager)
        self.kept, self.peak, self.number = [], 0, 0

    def total(self):
        return sum(size for size, _ in self.sizes.values()) + sum(self.kept)

    def admit(self, size, reuses):
        """Whether the model allows it, and what that does to what is kept."""
        if reuses and size in self.kept:
            self.kept.remove(size)
            return True
        if self.total() + size > self.capacity:
            self.kept.clear()
        return self.total() + size <= self.capacity

    def hold(self, make, size, reuses):
        if not self.admit(size, reuses):
            with pytest.raises(ResourceExhaustedError):
                make()
            return
        self.held.append((make(), self.number))
        self.sizes[self.number] = (size, reuses and size > 0)
        self.number += 1
        self.peak = max(self.peak, self.total())

    @rule(shape=st.sampled_from([(), (3,), (2, 7), (5, 5), (0, 4)]), dtype=st.sampled_from(list(DataType)))
    def make(self, shape, dtype):
        size = dtype.packed_bytes(int(np.prod(shape)))
        self.hold(lambda: self.factory.ones(shape, dtype, CPU), size, False)

    @rule(shape=st.sampled_from([(), (3,), (2, 7), (5, 5), (0, 4)]), dtype=st.sampled_from(list(DataType)))
    def preallocate(self, shape, dtype):
        size = dtype.packed_bytes(int(np.prod(shape)))
        self.hold(lambda: self.manager.preallocate(shape, dtype, CPU), size, True)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def view(self, data):
        tensor, number = self.held[data.draw(st.integers(0, len(self.held) - 1))]  # hypothesis keeps what it draws
        shape = tensor.shape()
        how = data.draw(st.sampled_from(["box", "flat", "turn"]))
        if how == "box":
            view = tensor.view((0,) * len(shape), tuple(dim // 2 + 1 if dim else 0 for dim in shape))
        elif how == "flat" and tensor.is_contiguous():
            view = tensor.reshape((tensor.numel(),))
        else:
            view = OPS.permute(tensor, tuple(reversed(range(len(shape)))))
        self.held.append((view, number))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        _, number = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if all(other != number for _, other in self.held):
            size, returns = self.sizes.pop(number)
            if returns:
                self.kept.append(size)

    @rule()
    def collect(self):
        self.manager.gc()
        self.kept.clear()

    @invariant()
    def the_counters_agree(self):
        used = sum(size for size, _ in self.sizes.values())
        assert stats(self.manager) == (self.total(), used, len(self.sizes), self.peak)


@pytest.mark.clause("TN-MEMORY-1", "TN-MEMORY-3", "TN-MEMORY-4", "TN-MEMORY-6")
def test_accounting_of_any_program():
    run_state_machine_as_test(Accounting, settings=settings(max_examples=40, stateful_step_count=30))
