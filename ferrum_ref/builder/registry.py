"""Built executors by model id.  Clauses: MB-REGISTRY-1..2 (specs/model_builder.md)."""

from __future__ import annotations

import threading

from ferrum_ref.errors import AlreadyExistsError
from ferrum_ref.interfaces.model_builder import ModelRegistry
from ferrum_ref.interfaces.model_executor import ModelExecutor
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo


class ExecutorModelRegistry(ModelRegistry):
    """Keeps executors in the order they came. Safe to share between threads.  [MB-REGISTRY-1..2]"""

    def __init__(self) -> None:
        self._executors: dict[ModelId, ModelExecutor] = {}
        self._lock = threading.Lock()

    def register_model(self, model_id: ModelId, executor: ModelExecutor) -> None:
        with self._lock:
            if model_id in self._executors:
                raise AlreadyExistsError(
                    f"register_model: {model_id} is taken; remove it first, or register under another id"
                )
            self._executors[model_id] = executor

    def get_model(self, model_id: ModelId) -> ModelExecutor | None:
        with self._lock:
            return self._executors.get(model_id)

    def remove_model(self, model_id: ModelId) -> ModelExecutor | None:
        with self._lock:
            return self._executors.pop(model_id, None)

    def list_models(self) -> list[ModelId]:
        with self._lock:
            return list(self._executors)

    def get_model_info(self, model_id: ModelId) -> ModelInfo | None:
        executor = self.get_model(model_id)
        return None if executor is None else executor.info()

    def contains_model(self, model_id: ModelId) -> bool:
        with self._lock:
            return model_id in self._executors
