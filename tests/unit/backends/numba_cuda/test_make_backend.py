"""Making the backend, what it says of itself, and devices that cannot be had."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ferrum_numba.gpu import make_backend
from ferrum_numba.gpu.kernel import kernel
from ferrum_numba.gpu.machine import SimulatedMachine, as_declared, usable_devices, why_unusable

from ferrum_ref.errors import BackendError, DeviceError, InternalError, InvalidParameterError, UnsupportedError
from ferrum_ref.types.devices import DataType, Device


@pytest.mark.clause("BK-NCUDA-1", "BK-NCUDA-3")
def test_the_simulated_backend_says_what_it_is(backend: Any) -> None:
    from numba_cuda import __version__

    assert backend.name() == "numba-cuda"
    assert backend.version() == f"numba-cuda {__version__} (simulator)"
    capabilities = backend.capabilities()
    assert capabilities.supported_devices == [Device.CPU]
    assert {DataType.FP32, DataType.FP16, DataType.BF16} <= set(capabilities.supported_dtypes)
    assert capabilities.extra_capabilities["quantized_linear"] == ["q4_0", "q8_0"]
    assert backend.supports_device(Device.CPU)
    assert not backend.supports_device(Device.CUDA(0))
    assert backend.kernel_ops().backend_name() == "numba-cuda"


@pytest.mark.clause("BK-NCUDA-3")
@pytest.mark.parametrize("device", ["cpu", "rocm:0", "metal"])
def test_a_device_of_another_kind_is_refused(device: str) -> None:
    with pytest.raises(UnsupportedError, match=r"expected cuda, cuda:N or simulator; .* numba-cpu"):
        make_backend(device)


@pytest.mark.clause("BK-NCUDA-1")
def test_a_text_that_names_no_device_is_an_invalid_parameter() -> None:
    with pytest.raises(InvalidParameterError, match="tpu"):
        make_backend("tpu")


@pytest.mark.clause("BK-NCUDA-3")
def test_without_a_gpu_the_reason_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import cuda

    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "cuda_error", lambda: "no\n driver")
    with pytest.raises(UnsupportedError, match=r"finds no usable NVIDIA GPU \(no driver\); install a driver, or use"):
        make_backend("cuda")


@pytest.mark.clause("BK-NCUDA-3")
def test_an_index_beyond_the_last_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import cuda

    monkeypatch.setattr(cuda, "is_available", lambda: True)
    old, new = SimpleNamespace(compute_capability=(7, 5)), SimpleNamespace(compute_capability=(8, 0))
    monkeypatch.setattr(cuda, "gpus", [old, new])
    assert why_unusable(Device.CUDA(2)) == "expected cuda:0 to cuda:1; correct the index"
    assert why_unusable(Device.CUDA(1)) == ""
    assert why_unusable(Device.CUDA(0)).startswith("of compute capability 7.5, expected at least 8.0")
    assert usable_devices() == [Device.CUDA(1)]


@pytest.mark.clause("BK-NCUDA-2")
def test_importing_the_package_imports_no_numba() -> None:
    code = "import sys, ferrum_numba.gpu; print([name for name in ('numba', 'greenlet') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.clause("BK-NCUDA-2")
def test_a_missing_numba_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ferrum_numba.gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'ferrum-ref\[numba-cuda\]'"):
        make_backend("simulator")


@pytest.mark.clause("BK-NCUDA-3", "BK-NCUDA-18")
def test_another_device_is_a_device_error(backend: Any, factory: Any, tensor: Any) -> None:
    for call in (
        lambda: factory.zeros((2,), DataType.FP32, Device.CUDA(0)),
        lambda: factory.from_numpy(np.zeros(2, np.float32), Device.CUDA(0)),
        lambda: tensor([1.0]).to_device(Device.CUDA(0)),
        lambda: asyncio.run(backend.initialize(Device.CUDA(0))),
        lambda: asyncio.run(backend.synchronize(Device.CUDA(3))),
    ):
        with pytest.raises(DeviceError, match="expected cpu"):
            call()
    asyncio.run(backend.initialize(Device.CPU))
    asyncio.run(backend.synchronize(Device.CPU))
    assert tensor([1.0]).to_device(Device.CPU).shape() == (1,)


@pytest.mark.clause("BK-NCUDA-18")
def test_operations_are_counted_until_the_shutdown(backend: Any, tensor: Any) -> None:
    ops, x = backend.tensor_ops(), tensor([1.0, 2.0])
    before = backend.status().operations_completed
    ops.silu(x)
    status = backend.status()
    assert (status.is_ready, status.operations_completed, status.active_devices) == (True, before + 1, [Device.CPU])
    asyncio.run(backend.shutdown())
    asyncio.run(backend.shutdown())
    assert not backend.status().is_ready
    with pytest.raises(BackendError, match="shut down"):
        ops.silu(x)
    with pytest.raises(BackendError, match="shut down"):
        backend.kernel_ops()


@pytest.mark.clause("BK-NCUDA-18")
def test_a_tensor_of_another_backend_is_told_how_to_come_over(ops: Any, kernels: Any, tensor: Any) -> None:
    from ferrum_ref.numpy_backend import make_backend as numpy_backend

    foreign = numpy_backend("cpu").tensor_factory().from_numpy(np.ones(2, np.float32))
    for call in (
        lambda: ops.add(tensor([1.0, 1.0]), foreign),
        lambda: kernels.norm_ops().rms_norm(foreign, tensor([1.0, 1.0]), 1e-5),
    ):
        with pytest.raises(BackendError, match=r"expected a tensor of the numba-cuda backend; convert it"):
            call()


@pytest.mark.clause("BK-NCUDA-17")
def test_a_launch_that_breaks_the_signature_is_refused() -> None:
    @kernel("float32[::1]", "int64", "float32")
    def nothing(array: Any, count: int, scale: Any) -> None:
        pass

    good = (np.zeros(3, np.float32), np.int32(3), 0.5)
    array, count, scale = as_declared(nothing, good)
    assert (array is good[0], type(count), type(scale)) == (True, int, np.float32)
    for bad in (
        (np.zeros(3, np.float64), 3, 0.5),
        (np.zeros(6, np.float32)[::2], 3, 0.5),
        (good[0], 2.5, 0.5),
        (good[0], 3),
    ):
        with pytest.raises(InternalError, match="nothing: "):
            SimulatedMachine().launch(nothing, 1, 1, *bad)


@pytest.mark.clause("BK-NCUDA-19")
def test_algorithms_are_declared(kernels: Any) -> None:
    assert kernels.declared_algorithm("rms_norm").accumulate == "fp32"
    assert kernels.declared_algorithm("attention").key_block == 2
    assert kernels.declared_algorithm("silu_mul").div_ulp == 2.0
    assert kernels.declared_algorithm("sample_token").accumulate == "fp64"
    assert not kernels.declared_algorithm("linear").truncates
