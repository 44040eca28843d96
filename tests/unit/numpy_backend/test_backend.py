"""NumpyBackend and make_backend."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.numpy_backend.backend import NumpyBackend
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
    heavy = ("numpy", "ml_dtypes", "ferrum_ref.numpy_backend.")
    code = f"import sys, ferrum_ref.numpy_backend; print([m for m in sys.modules if m.startswith({heavy})])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.clause("BK-COMPUTE-1", "BK-COMPUTE-5")
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
    assert backend.kernel_executor() is None
    status = backend.status()
    assert status == backend.status()
    assert status.is_ready
    assert not status.is_initialized
    assert status.backend_specific == {"operations_counted": False, "memory_counted": False}


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
