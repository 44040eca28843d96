"""Making a numba-cpu backend: devices, absence, life cycle, what is kept on disk, and what it must leave alone."""

from __future__ import annotations

import ast
import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from ferrum_numba.cpu import make_backend

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.backend import BackendRequirements, ComputeBackend
from ferrum_ref.types.devices import DataType, Device


@pytest.mark.clause("BK-NCPU-1")
def test_it_is_a_backend_named_numba_cpu(backend: Any) -> None:
    assert isinstance(backend, ComputeBackend)
    assert backend.name() == backend.kernel_ops().backend_name() == "numba-cpu"
    assert backend.version() == f"numba {numba.__version__}"
    assert backend.kernel_executor() is None
    with pytest.raises(UnsupportedError, match="memory_manager"):
        backend.memory_manager()


@pytest.mark.clause("BK-NCPU-1")
def test_other_devices_are_refused(factory: Any, tensor: Any) -> None:
    for text in ("", "gpu", "cpu:0"):
        with pytest.raises(InvalidParameterError):
            make_backend(text)
    with pytest.raises(UnsupportedError, match="expected cpu"):
        make_backend("cuda:0")
    with pytest.raises(DeviceError, match="expected cpu"):
        factory.zeros((1,), DataType.FP32, Device.Metal)
    with pytest.raises(DeviceError, match="expected cpu"):
        tensor([1.0]).to_device(Device.CUDA(0))


@pytest.mark.clause("BK-NCPU-1")
def test_capabilities_are_what_there_is(backend: Any, factory: Any) -> None:
    capabilities = backend.capabilities()
    assert capabilities.supported_devices == [Device.CPU]
    assert backend.supports_device(Device.CPU)
    assert not backend.supports_device(Device.CUDA(0))
    for dtype in DataType:
        if dtype in capabilities.supported_dtypes:
            assert factory.ones((2,), dtype, Device.CPU).dtype() is dtype
        else:
            with pytest.raises(DeviceError, match="keep packed 4-bit data"):
                factory.ones((2,), dtype, Device.CPU)
    assert DataType.BF16 in capabilities.supported_dtypes
    assert DataType.INT4 not in capabilities.supported_dtypes
    needs = BackendRequirements([Device.CPU], [DataType.FP16], 8, 4096, True, True, {})
    assert capabilities.meets_requirements(needs)


@pytest.mark.clause("BK-NCPU-2")
def test_importing_the_packages_imports_no_numba() -> None:
    program = "import sys, ferrum_numba, ferrum_numba.cpu; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.clause("BK-NCPU-2")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ModuleNotFoundError('no numba', name='numba')", "pip install 'ferrum-ref[numba]'"),
        ("raise ImportError('Numba needs NumPy 2.4 or less')", "Numba needs NumPy 2.4 or less"),
    ],
)
def test_absent_and_broken_are_told_apart(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(body)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom ferrum_numba.cpu import make_backend\n"
        "from ferrum_ref.errors import UnsupportedError\n"
        "try:\n    make_backend()\nexcept UnsupportedError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert words in done.stdout, done.stderr
    assert ("not installed" in done.stdout) == (body.count("Module") == 1)


@pytest.mark.clause("BK-NCPU-3")
def test_it_shares_no_code_with_what_judges_it(repository: Path) -> None:
    allowed = ("ferrum_ref.types", "ferrum_ref.interfaces", "ferrum_ref.errors")
    imported = set()
    for path in (repository / "backends" / "ferrum_numba" / "cpu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
    ours = {name for name in imported if name.startswith("ferrum_ref")}
    assert ours
    assert all(name.startswith(allowed) for name in ours), ours


@pytest.mark.clause("BK-NCPU-3", "BK-NCPU-16")
def test_life_cycle(backend: Any, tensor: Any) -> None:
    settings = (numba.get_num_threads(), np.geterr(), numba.config.NUMBA_NUM_THREADS)
    x = tensor([1.0, -2.0])
    asyncio.run(backend.initialize(Device.CPU))
    asyncio.run(backend.synchronize(Device.CPU))
    with pytest.raises(DeviceError):
        asyncio.run(backend.initialize(Device.Metal))
    before = backend.status()
    assert before.is_ready
    assert before.active_devices == [Device.CPU]
    assert before.backend_specific["num_threads"] == numba.get_num_threads()
    ops, kernels = backend.tensor_ops(), backend.kernel_ops()
    ops.relu(x)
    assert backend.status().operations_completed == before.operations_completed + 1
    asyncio.run(backend.shutdown())
    asyncio.run(backend.shutdown())
    assert not backend.status().is_ready
    assert backend.status().active_devices == []
    for call in (lambda: ops.relu(x), lambda: kernels.sampling_ops().argmax(x)):
        with pytest.raises(BackendError, match="shut down"):
            call()
    for accessor in (backend.tensor_ops, backend.tensor_factory, backend.kernel_ops, backend.tensor_batch_ops):
        with pytest.raises(BackendError, match="shut down"):
            accessor()
    assert x.to_vec_f32().tolist() == [1.0, -2.0]
    assert settings == (numba.get_num_threads(), np.geterr(), numba.config.NUMBA_NUM_THREADS)


@pytest.mark.clause("BK-NCPU-16")
def test_another_backends_tensor_is_refused_with_the_remedy(ops: Any, kernels: Any, tensor: Any) -> None:
    from ferrum_ref.numpy_backend.tensor import NumpyTensor

    foreign, own = NumpyTensor(np.ones((2, 2), np.float32)), tensor(np.ones((2, 2)))
    for call in (
        lambda: ops.add(foreign, own),
        lambda: ops.add(own, foreign),
        lambda: kernels.linear_ops().linear(own, foreign),
        lambda: ops.concat([own, foreign], 0),
        lambda: ops.relu(np.ones(3)),
    ):
        with pytest.raises(BackendError, match=r"expected a tensor of the numba-cpu backend; .*from_numpy"):
            call()


NORM = (
    "import sys; sys.path.insert(0, {path!r})\n"
    "import numpy as np\nfrom ferrum_numba.cpu import make_backend, compiled\n"
    "backend = make_backend()\nx = backend.tensor_factory().from_numpy(np.arange(8, dtype=np.float16))\n"
    "print(x.to_dtype(backend.tensor_factory().from_numpy(np.ones(1, np.float32)).dtype()).to_numpy()[3])\n"
    "from ferrum_numba.cpu.floats import widen_all\n"
    "print(sum(widen_all._dispatcher.stats.cache_hits.values()), widen_all._dispatcher.stats.cache_path)"
)


def run_with(package: Path, **environment: str) -> tuple[float, int, str]:
    """(a converted number, cache hits, cache folder) of a fresh process that takes the package from there."""
    program = NORM.format(path=str(package))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    value, _, rest = done.stdout.partition("\n")
    hits, _, folder = rest.strip().partition(" ")
    return float(value), int(hits), folder


@pytest.fixture
def copied(repository: Path, tmp_path: Path) -> Path:
    """A shelf with a copy of the package that has compiled nothing yet."""
    shelf = tmp_path / "shelf"
    source = repository / "backends" / "ferrum_numba"
    (shelf / "ferrum_numba").mkdir(parents=True)
    shutil.copy(source / "__init__.py", shelf / "ferrum_numba")
    shutil.copytree(source / "cpu", shelf / "ferrum_numba" / "cpu", ignore=shutil.ignore_patterns("__pycache__"))
    return shelf


@pytest.mark.slow
@pytest.mark.clause("BK-NCPU-5")
def test_what_was_compiled_is_kept_until_any_source_changes(copied: Path, tmp_path: Path) -> None:
    value, hits, folder = run_with(copied)
    assert (value, hits) == (3.0, 0)
    assert folder.startswith(str(copied))
    assert run_with(copied)[:2] == (3.0, 1)
    other = copied / "ferrum_numba" / "cpu" / "threads.py"  # not the file that defines the kernel
    other.write_text(other.read_text() + "\n# another version\n")
    assert run_with(copied)[:2] == (3.0, 0)
    shutil.rmtree(copied / "ferrum_numba" / "cpu" / "__pycache__")
    home = nothing_beside(copied, tmp_path / "home")
    (tmp_path / "home").mkdir()
    value, _, folder = run_with(copied, **home)
    assert value == 3.0
    assert folder.startswith(str(tmp_path / "home"))


def nothing_beside(shelf: Path, home: Path) -> dict[str, str]:
    """Blocks the folder beside the package; the environment that puts the user's cache directory under `home`."""
    (shelf / "ferrum_numba" / "cpu" / "__pycache__").write_text("a file where the folder would be")
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.clause("BK-NCPU-5")
def test_it_works_where_nothing_can_be_kept(copied: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("no folder either")
    value, hits, folder = run_with(copied, **nothing_beside(copied, blocked))
    assert (value, hits, folder) == (3.0, 0, "None")


@pytest.mark.clause("BK-NCPU-5")
def test_the_digest_of_the_sources_belongs_to_what_is_kept() -> None:
    from ferrum_numba.cpu import compiled
    from ferrum_numba.cpu.floats import widen_all

    stamp = widen_all._dispatcher._cache._cache_file._source_stamp
    assert compiled.SOURCES in stamp
