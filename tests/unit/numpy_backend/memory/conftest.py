"""Small managers with a clock that a test moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ferrum_ref.interfaces.memory import MemoryManagerConfig, MemoryPoolConfig, MemoryType
from ferrum_ref.numpy_backend.memory import NumpyMemoryManager
from ferrum_ref.types.devices import Device


class Clock:
    """Seconds; `step_s` passes at every look."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def small(clock: Clock) -> Callable[..., NumpyMemoryManager]:
    """small(capacity=4096, alignment=16, pools=None, pool={}, config={}, **manager arguments): all bytes at start."""

    def make(
        capacity: int = 4096,
        alignment: int = 16,
        pools: dict[MemoryType, MemoryPoolConfig] | None = None,
        pool: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> NumpyMemoryManager:
        general = MemoryPoolConfig(**{"initial_size": capacity, "alignment": alignment, **(pool or {})})
        settings = MemoryManagerConfig(**{"pool_configs": pools or {MemoryType.General: general}, **(config or {})})
        arguments.setdefault("clock", clock)
        return NumpyMemoryManager(Device.CPU, capacity, settings, **arguments)

    return make
