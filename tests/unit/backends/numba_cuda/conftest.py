"""A simulated backend, short ways to make its tensors, and numba.cuda itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda")
pytest.importorskip("greenlet")


@pytest.fixture
def backend() -> Any:
    from ferrum_numba.gpu import make_backend

    return make_backend("simulator")


@pytest.fixture
def kernels(backend: Any) -> Any:
    return backend.kernel_ops()


@pytest.fixture
def ops(backend: Any) -> Any:
    return backend.tensor_ops()


@pytest.fixture
def factory(backend: Any) -> Any:
    return backend.tensor_factory()


@pytest.fixture
def tensor(factory: Any) -> Callable[..., Any]:
    """tensor(values, dtype=float32): a tensor of these values."""

    def make(values: Any, dtype: Any = np.float32) -> Any:
        return factory.from_numpy(np.asarray(values).astype(dtype))

    return make


@pytest.fixture
def tuned() -> Callable[..., Any]:
    """tuned(gemv_rows=..., ...): a simulated backend that chooses its kernels by these sizes."""
    from ferrum_numba.gpu.backend import NumbaCudaBackend
    from ferrum_numba.gpu.machine import SimulatedMachine
    from ferrum_numba.gpu.runtime import Tuning
    from ferrum_numba.simulator import Schedule

    def make(schedule: Any = Schedule.FORWARDS, **sizes: int) -> Any:
        return NumbaCudaBackend(SimulatedMachine(schedule), Tuning(**sizes))

    return make
