"""Health of an engine and of its parts; `ferrum_ref.types.metrics` re-exports these names.

Clauses: TY-METRICS-2..3 (specs/types.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from ferrum_ref.types.record import F64


class HealthStatusType(enum.Enum):
    """Level of health."""

    Healthy = "Healthy"
    Warning = "Warning"
    Unhealthy = "Unhealthy"


ComponentHealthStatus: TypeAlias = HealthStatusType


@dataclass(frozen=True, slots=True)
class ComponentHealth:
    """Health of one part."""

    status: HealthStatusType
    message: str
    metrics: dict[str, F64]
    last_check: datetime

    @staticmethod
    def healthy(component: str, *, last_check: datetime | None = None) -> ComponentHealth:
        """Healthy, with the message "<component> healthy".  [TY-METRICS-2]"""
        return ComponentHealth(HealthStatusType.Healthy, f"{component} healthy", {}, last_check or datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class ComponentStatus:
    """Health of the six parts of an engine."""

    scheduler: ComponentHealth
    model_executor: ComponentHealth
    tokenizer: ComponentHealth
    kv_cache: ComponentHealth
    memory_manager: ComponentHealth
    backend: ComponentHealth

    @staticmethod
    def healthy(*, last_check: datetime | None = None) -> ComponentStatus:
        """All healthy; the messages name scheduler, model, tokenizer, kv_cache, memory and backend.  [TY-METRICS-2]"""
        when = last_check or datetime.now(UTC)
        names = ("scheduler", "model", "tokenizer", "kv_cache", "memory", "backend")
        return ComponentStatus(*(ComponentHealth.healthy(name, last_check=when) for name in names))

    def entries(
        self,
    ) -> tuple[ComponentHealth, ComponentHealth, ComponentHealth, ComponentHealth, ComponentHealth, ComponentHealth]:
        """The six in declaration order.  [TY-METRICS-3]"""
        return (
            self.scheduler, self.model_executor, self.tokenizer, self.kv_cache, self.memory_manager, self.backend,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """Health of an engine."""

    status: HealthStatusType
    component_status: ComponentStatus
    last_check: datetime

    @staticmethod
    def healthy(*, last_check: datetime | None = None) -> HealthStatus:
        """Everything healthy.  [TY-METRICS-2]"""
        when = last_check or datetime.now(UTC)
        return HealthStatus(HealthStatusType.Healthy, ComponentStatus.healthy(last_check=when), when)
