"""A numba-cpu backend, short ways to make its tensors, and float32's rounding units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from ferrum_numba.cpu import make_backend

U32 = 2.0**-24


@pytest.fixture
def backend() -> Any:
    return make_backend("cpu")


@pytest.fixture
def factory(backend: Any) -> Any:
    return backend.tensor_factory()


@pytest.fixture
def ops(backend: Any) -> Any:
    return backend.tensor_ops()


@pytest.fixture
def kernels(backend: Any) -> Any:
    return backend.kernel_ops()


@pytest.fixture
def tensor(factory: Any) -> Callable[..., Any]:
    """tensor(values, dtype=float32): a tensor of these values."""

    def make(values: Any, dtype: Any = np.float32) -> Any:
        return factory.from_numpy(np.array(values, dtype=dtype))

    return make


@pytest.fixture
def close() -> Callable[..., None]:
    """close(tensor, float64 values, num_roundings, magnitude): |error| <= gamma_k * magnitude, in float32 units.

    gamma_k = k u / (1 - k u) with u = 2**-24 bounds k successive roundings of terms whose absolute values add up to
    `magnitude` (default: the values' own).
    """

    def check(result: Any, expected: Any, num_roundings: float, magnitude: Any = None) -> None:
        got, want = np.asarray(result.to_numpy(), np.float64), np.asarray(expected, dtype=np.float64)
        assert got.shape == want.shape
        gamma = num_roundings * U32 / (1 - num_roundings * U32)
        bound = gamma * np.abs(want if magnitude is None else magnitude) + np.finfo(np.float32).smallest_subnormal
        worst = np.max(np.abs(got - want) / bound, initial=0.0)
        assert worst <= 1.0, f"error is {worst:.3g} of its bound"

    return check


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n): let Numba use n threads, or as many as it has; put back afterwards."""
    import numba

    before = numba.get_num_threads()

    def use(count: int) -> None:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))

    yield use
    numba.set_num_threads(before)
