"""The engines: what one may ask of a running model.  Later modalities get interfaces of their own beside this one.

Upstream: `ferrum_interfaces::engine` in its form of 0.7.4, where the trait of 0.7.0 is split into a lifecycle base and
one trait per modality.  Clauses: EN-INTERFACE-1..3 (specs/engine.md).
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ferrum_ref.types.config import EngineConfig
    from ferrum_ref.types.metrics import EngineMetrics, EngineStatus, HealthStatus
    from ferrum_ref.types.record import Json
    from ferrum_ref.types.requests import InferenceRequest, InferenceResponse, StreamChunk

__all__ = ["InferenceEngine", "LlmInferenceEngine"]


class InferenceEngine(abc.ABC):
    """What every engine offers: its life and its numbers.  [EN-INTERFACE-1]"""

    @abc.abstractmethod
    async def status(self) -> EngineStatus:
        """Snapshot of the engine.  Pure."""

    @abc.abstractmethod
    async def shutdown(self) -> None:
        """Accept nothing more and end what runs.  A second call does nothing."""

    @abc.abstractmethod
    def config(self) -> EngineConfig:
        """The settings the engine was built with.  Pure."""

    @abc.abstractmethod
    def metrics(self) -> EngineMetrics:
        """Totals since the engine was built.  Pure."""

    @abc.abstractmethod
    async def health_check(self) -> HealthStatus:
        """Health of the engine and its six parts.  Pure."""

    def cache_metrics_snapshot(self) -> Json | None:
        """The caches' numbers as JSON, or None where there are none."""
        return None

    def lora_metrics_snapshot(self) -> Json | None:
        """The adapters' numbers as JSON, or None where there are none."""
        return None


class LlmInferenceEngine(InferenceEngine):
    """Text generation.  [EN-INTERFACE-2..3]"""

    @abc.abstractmethod
    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """One request to its end.

        Raises RequestValidationError for bad parameters, UnsupportedError for parameters not offered, NotFoundError for
        an unknown model, SchedulerError or ResourceExhaustedError under overload, and the error of a step that failed.
        """

    @abc.abstractmethod
    async def infer_stream(self, request: InferenceRequest) -> AsyncIterator[StreamChunk]:
        """The pieces of one answer as they come; the last has finish_reason and usage.  Raises as `infer`.

        `async for chunk in await engine.infer_stream(request)`. Errors of the request itself are raised by the await,
        those of a later step by the iteration.
        """
