"""Executors by name.  Clauses: MX-REGISTRY-1 (specs/model_executor.md)."""

from __future__ import annotations

import threading

from ferrum_ref.errors import AlreadyExistsError
from ferrum_ref.interfaces.model_executor import ExecutorMetrics, ExecutorRegistry, MeasuredExecutor, ModelExecutor


class NamedExecutors(ExecutorRegistry):
    """A dictionary behind a lock; owns nothing: removing an executor does not shut it down.  [MX-REGISTRY-1]"""

    def __init__(self) -> None:
        self._executors: dict[str, ModelExecutor] = {}
        self._lock = threading.Lock()

    def register(self, name: str, executor: ModelExecutor) -> None:
        with self._lock:
            if name in self._executors:
                raise AlreadyExistsError(f"ExecutorRegistry.register: {name!r} is taken; remove it first")
            self._executors[name] = executor

    def get(self, name: str) -> ModelExecutor | None:
        with self._lock:
            return self._executors.get(name)

    def remove(self, name: str) -> ModelExecutor | None:
        with self._lock:
            return self._executors.pop(name, None)

    def list_names(self) -> list[str]:
        with self._lock:
            return list(self._executors)

    def get_metrics(self, name: str) -> ExecutorMetrics | None:
        executor = self.get(name)
        return executor.metrics() if isinstance(executor, MeasuredExecutor) else None
