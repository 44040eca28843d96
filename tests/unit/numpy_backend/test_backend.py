"""NumpyBackend and make_backend."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest

from ferrum_ref.backend_registry import NamedBackends
from ferrum_ref.errors import (
    BackendError,
    DeviceError,
    InvalidParameterError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.backend import (
    BackendConfig,
    BackendMemoryConfig,
    BackendType,
    ComputeBackend,
    KernelExecutor,
)
from ferrum_ref.interfaces.backend import MemoryGrowthStrategy as Growth
from ferrum_ref.interfaces.memory import DeviceMemoryManager, MemoryAccess, MemoryType
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.numpy_backend.backend import NumpyBackend
from ferrum_ref.numpy_backend.memory import NumpyMemoryManager
from ferrum_ref.types.devices import DataType, Device


@pytest.mark.clause("BK-NUMPY-1")
def test_make_backend():
    for device in ("cpu", "CPU"):
        backend = make_backend(device)
        assert isinstance(backend, ComputeBackend)
        assert backend.name() == "numpy"
        assert np.__version__ in backend.version()
    with pytest.raises(UnsupportedError, match="--backend torch"):
        make_backend("cuda:0")
    with pytest.raises(InvalidParameterError):
        make_backend("tpu")


@pytest.mark.clause("BK-NUMPY-1")
def test_importing_the_package_loads_no_submodule():
    inside = "ferrum_ref.numpy_backend."
    code = f"import sys, ferrum_ref.numpy_backend; print([m for m in sys.modules if m.startswith({inside!r})])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.clause("BK-COMPUTE-1", "BK-COMPUTE-6")
def test_works_from_construction_on():
    backend = NumpyBackend()
    x = backend.tensor_factory().ones((2, 2), DataType.FP32, Device.CPU)
    assert backend.tensor_ops().add(x, x).to_vec_f32().tolist() == [2] * 4
    assert backend.kernel_ops().backend_name() == "numpy"
    assert backend.tensor_ops() is backend.tensor_ops()
    capabilities = backend.capabilities()
    assert set(capabilities.supported_dtypes) == set(DataType)
    assert capabilities.supported_devices == [Device.CPU]
    assert capabilities.supports_paged_attention
    assert capabilities.supports_custom_kernels
    assert isinstance(backend.kernel_executor(), KernelExecutor)
    assert isinstance(backend.memory_manager(), DeviceMemoryManager)
    status = backend.status()
    assert status == backend.status()
    assert status.is_ready
    assert not status.is_initialized


@pytest.mark.clause("BK-NUMPY-6", "BK-COMPUTE-6")
def test_operations_and_their_last_error_are_counted():
    backend = NumpyBackend()
    ones = backend.tensor_factory().ones((2, 2), DataType.FP32, Device.CPU)
    before = backend.status()
    assert (before.operations_completed, before.last_error) == (1, None)
    backend.tensor_ops().add(ones, ones)
    with pytest.raises(BackendError) as caught:
        backend.tensor_ops().matmul(ones, backend.kernel_ops().activation_ops().gelu(ones).reshape((4, 1)))
    after = backend.status()
    assert after.operations_completed == before.operations_completed + 2
    assert after.last_error == str(caught.value)
    backend.capabilities(), backend.kernel_ops().declared_algorithm("gelu"), backend.tensor_ops()
    assert backend.status() == after


@pytest.mark.clause("BK-NUMPY-6")
def test_what_an_operation_calls_inside_counts_once():
    from ferrum_ref.numpy_backend.ledger import Ledger, counted

    class Nested:
        scale = 3

        def outer(self, x):
            return self.inner(x) + self.inner(x)

        def inner(self, x):
            return self.scale * x

        async def later(self, x):
            return self.inner(x)

    ledger = Ledger()
    part = counted(Nested(), ledger)
    assert isinstance(part, Nested)
    assert part.outer(2) == 12
    assert ledger.num_operations == 1
    assert asyncio.run(part.later(2)) == 6
    assert part.scale == 3
    assert ledger.num_operations == 2
    with pytest.raises(TypeError):
        asyncio.run(part.later(None))
    assert ledger.num_operations == 2
    assert "unsupported operand" in ledger.last_error


@pytest.mark.clause("BK-NUMPY-6", "BK-COMPUTE-7")
def test_threads_lose_no_count_and_all_see_a_shutdown():
    backend = NumpyBackend()
    ones = backend.tensor_factory().ones((1,), DataType.FP32, Device.CPU)

    def work() -> None:
        for _ in range(500):
            backend.tensor_ops().add(ones, ones)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.status().operations_completed == 2001
    registry = NamedBackends()
    registry.register_compute_backend("shared", backend)
    other = threading.Thread(target=lambda: asyncio.run(registry.get_compute_backend("shared").shutdown()))
    other.start()
    other.join()
    assert not backend.status().is_ready


@pytest.mark.clause("BK-NUMPY-7", "BK-COMPUTE-6")
def test_memory_usage_is_what_the_manager_has_lent():
    backend = NumpyBackend()
    assert backend.status().memory_usage == {Device.CPU: 0}
    manager = backend.memory_manager()
    assert isinstance(manager, NumpyMemoryManager)
    assert backend.memory_manager() is manager
    handle = asyncio.run(manager.allocate(1000, Device.CPU))
    lent = asyncio.run(manager.memory_info(Device.CPU)).used_bytes
    assert lent >= 1000
    status = backend.status()
    assert status.memory_usage == {Device.CPU: lent}
    assert status.backend_specific["num_allocations"] == 1
    asyncio.run(manager.deallocate(handle))
    assert backend.status().memory_usage == {Device.CPU: 0}
    assert backend.status().operations_completed == 0


def settings(**changes):
    memory = {"pool_size": 8192, "alignment": 64, "enable_pooling": True, "growth_strategy": Growth.Dynamic}
    memory.update({name: changes.pop(name) for name in list(changes) if name in memory})
    plain = {"backend_type": BackendType.CPU, "device": Device.CPU, "optimization_level": 1, "enable_debug": False}
    return BackendConfig(**{**plain, **changes}, memory_config=BackendMemoryConfig(**memory), backend_options={})


@pytest.mark.clause("BK-NUMPY-8")
def test_debugging_reports_a_new_nan_by_operation():
    backend = NumpyBackend()
    backend.configure(settings(enable_debug=True))
    ops, factory = backend.tensor_ops(), backend.tensor_factory()
    zero, nan = factory.zeros((1,), DataType.FP32, Device.CPU), factory.from_numpy(np.array([np.nan], np.float32))
    with pytest.raises(BackendError, match="div: the result has a NaN and no operand had one"):
        ops.div(zero, zero)
    assert "div" in backend.status().last_error
    assert np.isnan(ops.add(nan, zero).to_numpy()).all()
    assert backend.status().backend_specific["calls"] == {"add": 1, "from_numpy": 1, "zeros": 1}
    assert np.isnan(NumpyBackend().tensor_ops().div(zero, zero).to_numpy()).all()
    manager = backend.memory_manager()
    view = asyncio.run(manager.map_memory(asyncio.run(manager.allocate(64, Device.CPU)), MemoryAccess.ReadWrite))
    assert bytes(view) == bytes(64)


@pytest.mark.clause("BK-NUMPY-9")
@pytest.mark.parametrize(
    ("growth", "committed"),
    [(Growth.Static, [8192, 8192]), (Growth.Dynamic, [0, 1088]), (Growth.Incremental, [1024, 2048])],
)
def test_the_pool_grows_as_its_strategy_says(growth, committed):
    backend = NumpyBackend()
    backend.configure(settings(growth_strategy=growth))
    manager = backend.memory_manager()
    found = [manager.usage(Device.CPU)[MemoryType.General].committed_bytes]
    asyncio.run(manager.allocate(1025, Device.CPU))
    found.append(manager.usage(Device.CPU)[MemoryType.General].committed_bytes)
    assert found == committed
    handle = asyncio.run(manager.allocate(8192 - 1088, Device.CPU))
    assert manager.handle_info(handle).alignment == 64
    with pytest.raises(ResourceExhaustedError):
        asyncio.run(manager.allocate(1, Device.CPU))


@pytest.mark.clause("BK-NUMPY-9")
def test_settings_come_before_use_and_are_not_ignored():
    with pytest.raises(UnsupportedError, match="enable_pooling"):
        NumpyBackend().configure(settings(enable_pooling=False))
    with pytest.raises(InvalidParameterError, match="alignment"):
        NumpyBackend().configure(settings(alignment=4 << 20, pool_size=8 << 20))
    backend = NumpyBackend()
    backend.configure(settings())
    with pytest.raises(BackendError, match="configure"):
        backend.configure(settings())
    used = NumpyBackend()
    used.memory_manager()
    with pytest.raises(BackendError, match="configure"):
        used.configure(settings())


@pytest.mark.clause("BK-NUMPY-10")
def test_parts_handed_out_before_refuse_after_shutdown():
    backend = NumpyBackend()
    ones = backend.tensor_factory().ones((2,), DataType.FP32, Device.CPU)
    ops, factory, kernels = backend.tensor_ops(), backend.tensor_factory(), backend.kernel_ops()
    manager, executor = backend.memory_manager(), backend.kernel_executor()
    gelu = kernels.activation_ops()
    asyncio.run(backend.shutdown())
    for call in (
        lambda: ops.add(ones, ones),
        lambda: factory.zeros((1,), DataType.FP32, Device.CPU),
        lambda: gelu.gelu(ones),
        lambda: asyncio.run(manager.allocate(1, Device.CPU)),
        lambda: asyncio.run(executor.load_kernel("def f(t): pass", "f", Device.CPU)),
        backend.memory_manager,
        backend.kernel_executor,
        lambda: backend.configure(settings()),
    ):
        with pytest.raises(BackendError, match="has been shut down; make a new one"):
            call()
    assert backend.status().memory_usage == {}


@pytest.mark.clause("BK-COMPUTE-2")
def test_initialize():
    backend = NumpyBackend()
    asyncio.run(backend.initialize(Device.CPU))
    once = backend.status()
    asyncio.run(backend.initialize(Device.CPU))
    assert backend.status() == once
    assert once.is_initialized
    assert once.active_devices == [Device.CPU]
    asyncio.run(backend.synchronize(Device.CPU))
    assert backend.supports_device(Device.CPU)
    assert not backend.supports_device(Device.cuda(0))
    for method in (backend.initialize, backend.synchronize):
        with pytest.raises(DeviceError, match="cuda:1, expected cpu"):
            asyncio.run(method(Device.cuda(1)))


@pytest.mark.clause("BK-COMPUTE-3")
def test_shutdown():
    backend = NumpyBackend()
    x = backend.tensor_factory().ones((1,), DataType.FP32, Device.CPU)
    asyncio.run(backend.shutdown())
    asyncio.run(backend.shutdown())
    status = backend.status()
    assert not status.is_ready
    assert status.active_devices == []
    assert x.to_vec_f32().tolist() == [1]
    for method in (backend.tensor_ops, backend.tensor_factory, backend.kernel_ops):
        with pytest.raises(BackendError, match="shut down"):
            method()
    for method in (backend.initialize, backend.synchronize):
        with pytest.raises(BackendError, match="shut down"):
            asyncio.run(method(Device.CPU))


@pytest.mark.clause("TN-FACTORY-6")
def test_the_random_generator_is_injected():
    one, two = (
        NumpyBackend(np.random.default_rng(3)).tensor_factory().normal((4,), 0.0, 1.0, DataType.FP32, Device.CPU)
        for _ in range(2)
    )
    assert (one.to_numpy() == two.to_numpy()).all()
    other = NumpyBackend().tensor_factory().normal((4,), 0.0, 1.0, DataType.FP32, Device.CPU)
    assert (other.to_numpy() != one.to_numpy()).any()


@pytest.mark.clause("BK-NUMPY-11")
def test_operations_over_lists_and_awaited_ones_are_its_own() -> None:
    backend = make_backend("cpu")
    x = backend.tensor_factory().from_numpy(np.arange(4, dtype=np.float32).reshape(2, 2))
    (product,) = backend.tensor_batch_ops().batch_matmul([x], [x])
    awaited = backend.async_tensor_ops()
    assert awaited is backend.async_tensor_ops()
    assert np.array_equal(asyncio.run(awaited.matmul_async(x, x)).to_numpy(), product.to_numpy())
    asyncio.run(backend.shutdown())
    with pytest.raises(BackendError):
        asyncio.run(awaited.matmul_async(x, x))
    for accessor in (backend.tensor_batch_ops, backend.async_tensor_ops):
        with pytest.raises(BackendError):
            accessor()
