"""Making a torch backend: devices, absence, life cycle, and what it must leave alone."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ferrum_torch import make_backend

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.backend import BackendRequirements, ComputeBackend
from ferrum_ref.types.devices import DataType, Device

HAS_GPU = torch.cuda.is_available()


@pytest.mark.clause("BK-TORCH-1")
def test_it_is_a_backend_named_torch(backend: Any) -> None:
    assert isinstance(backend, ComputeBackend)
    assert backend.name() == backend.kernel_ops().backend_name() == "torch"
    assert backend.version() == f"torch {torch.__version__}"
    assert backend.kernel_executor() is None
    with pytest.raises(UnsupportedError, match="memory_manager"):
        backend.memory_manager()


@pytest.mark.clause("BK-TORCH-1")
@pytest.mark.parametrize("text", ["", "gpu", "cuda:x", "cpu:0"])
def test_a_text_that_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError):
        make_backend(text)


@pytest.mark.clause("BK-TORCH-2")
def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, ferrum_torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.clause("BK-TORCH-2")
def test_a_torch_that_does_not_load_is_told_from_an_absent_one(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom ferrum_torch import make_backend\n"
        "from ferrum_ref.errors import UnsupportedError\n"
        "try:\n    make_backend()\nexcept UnsupportedError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "does not load" in done.stdout, done.stderr
    assert "libcudart.so.13" in done.stdout


@pytest.mark.clause("BK-TORCH-3")
@pytest.mark.parametrize("device", ["rocm:0", "metal"])
def test_a_kind_of_device_that_it_does_not_drive(device: str, factory: Any) -> None:
    with pytest.raises(UnsupportedError, match="expected cpu or cuda:N"):
        make_backend(device)
    with pytest.raises(DeviceError, match="expected cpu or cuda:N"):
        factory.zeros((1,), DataType.FP32, Device.parse(device))


@pytest.mark.clause("BK-TORCH-3")
@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_named(tensor: Any) -> None:
    reason = "built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU"
    with pytest.raises(UnsupportedError, match=reason):
        make_backend("cuda:0")
    with pytest.raises(DeviceError, match=reason):
        tensor([1.0]).to_device(Device.CUDA(0))


@pytest.mark.clause("BK-TORCH-3")
@pytest.mark.parametrize(
    ("cuda", "usable", "count", "reason"),
    [
        (None, False, 0, "without CUDA"),
        ("13.0", False, 0, "no usable NVIDIA GPU"),
        ("13.0", True, 2, "cuda:0 to cuda:1"),
    ],
)
def test_each_reason_has_its_own_words(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, usable: bool, count: int, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UnsupportedError, match=reason):
        make_backend("cuda:2")


@pytest.mark.clause("BK-TORCH-3")
def test_capabilities_list_what_is_usable(backend: Any) -> None:
    capabilities = backend.capabilities()
    assert capabilities.supported_devices[0] == Device.CPU
    assert len(capabilities.supported_devices) == 1 + (torch.cuda.device_count() if HAS_GPU else 0)
    assert backend.supports_device(Device.CPU)
    assert not backend.supports_device(Device.Metal)
    assert DataType.BF16 in capabilities.supported_dtypes
    assert DataType.INT4 not in capabilities.supported_dtypes
    needs = BackendRequirements([Device.CPU], [DataType.FP16], 8, 4096, False, True, {})
    assert capabilities.meets_requirements(needs)


@pytest.mark.clause("BK-TORCH-11")
def test_life_cycle(backend: Any, tensor: Any) -> None:
    x = tensor([1.0, -2.0])
    asyncio.run(backend.initialize(Device.CPU))
    asyncio.run(backend.initialize(Device.CPU))
    asyncio.run(backend.synchronize(Device.CPU))
    with pytest.raises(DeviceError):
        asyncio.run(backend.initialize(Device.Metal))
    before = backend.status()
    assert before.is_ready
    assert before.active_devices == [Device.CPU]
    assert before.memory_usage == {}
    backend.tensor_ops().relu(x)
    assert backend.status().operations_completed == before.operations_completed + 1
    ops, kernels = backend.tensor_ops(), backend.kernel_ops()
    asyncio.run(backend.shutdown())
    asyncio.run(backend.shutdown())
    assert not backend.status().is_ready
    assert backend.status().active_devices == []
    for call in (lambda: ops.relu(x), lambda: kernels.sampling_ops().argmax(x)):
        with pytest.raises(BackendError, match="shut down"):
            call()
    for accessor in (backend.tensor_ops, backend.tensor_factory, backend.kernel_ops):
        with pytest.raises(BackendError, match="shut down"):
            accessor()
    for coroutine in (backend.initialize, backend.synchronize):
        with pytest.raises(BackendError, match="shut down"):
            asyncio.run(coroutine(Device.CPU))
    assert x.to_vec_f32().tolist() == [1.0, -2.0]


@pytest.mark.clause("BK-TORCH-20")
def test_no_global_setting_changes(backend: Any, tensor: Any, kernels: Any) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    make_backend("cpu")
    x = tensor(np.ones((2, 4)))
    kernels.linear_ops().linear(x, x)
    kernels.norm_ops().rms_norm(x, tensor(np.ones(4)), 1e-5)
    backend.tensor_factory().normal((3,), 0.0, 1.0, DataType.FP32, Device.CPU)
    assert settings() == before


@pytest.mark.clause("BK-TORCH-20")
def test_it_shares_no_code_with_what_judges_it(repository: Path) -> None:
    allowed = ("ferrum_ref.types", "ferrum_ref.interfaces", "ferrum_ref.errors")
    imported = set()
    for path in (repository / "backends" / "ferrum_torch").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
    ours = {name for name in imported if name.startswith("ferrum_ref")}
    assert ours
    assert all(name.startswith(allowed) for name in ours), ours


@pytest.mark.clause("BK-TORCH-21")
def test_another_backends_tensor_is_refused_with_the_remedy(ops: Any, kernels: Any, tensor: Any) -> None:
    from ferrum_ref.numpy_backend.tensor import NumpyTensor

    foreign = NumpyTensor(np.ones((2, 2), np.float32))
    own = tensor(np.ones((2, 2)))
    for call in (
        lambda: ops.add(foreign, own),
        lambda: ops.add(own, foreign),
        lambda: kernels.linear_ops().linear(own, foreign),
        lambda: ops.concat([own, foreign], 0),
        lambda: ops.relu(np.ones(3)),
    ):
        with pytest.raises(BackendError, match=r"expected a tensor of the torch backend; .*from_numpy"):
            call()


@pytest.mark.clause("BK-TORCH-21")
def test_operands_on_different_devices_are_refused(ops: Any, tensor: Any) -> None:
    from ferrum_torch.tensor import TorchTensor

    elsewhere = TorchTensor(torch.ones(2, device="meta"))
    with pytest.raises(DeviceError, match="b: is on meta, expected cpu"):
        ops.add(tensor([1.0, 2.0]), elsewhere)
