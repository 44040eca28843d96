"""What an engine says about itself: status and health, from real counts.  Clauses: EN-STATUS-1..3 (specs/engine.md)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.kv_cache import CacheManagerStats, KvCacheManager
from ferrum_ref.types.metrics import (
    ComponentHealth,
    ComponentStatus,
    EngineStatus,
    HealthStatus,
    HealthStatusType,
    MemoryUsage,
)
from ferrum_ref.types.models import ModelInfo

NEARLY_FULL = 0.9
ORDER = (HealthStatusType.Healthy, HealthStatusType.Warning, HealthStatusType.Unhealthy)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Reads the parts of an engine; changes none of them.  [EN-STATUS-1..3]"""

    loop: StepLoop
    kv_cache: KvCacheManager
    model_info: ModelInfo
    max_waiting_requests: int
    version: str

    def status(self, is_ready: bool, uptime_s: float, when: datetime) -> EngineStatus:
        """Counts of the step loop and bytes of the KV cache.  Pure.  [EN-STATUS-1]"""
        return EngineStatus(
            is_ready=is_ready,
            loaded_models=[self.model_info.model_id],
            active_requests=self.loop.num_running,
            queued_requests=self.loop.num_waiting,
            memory_usage=self.memory(),
            uptime_seconds=int(uptime_s),
            last_heartbeat=when,
            version=self.version,
        )

    def memory(self) -> MemoryUsage:
        """The KV cache's memory: total, used and free.  Pure."""
        stats = self.kv_cache.stats()
        total, used = stats.total_memory_bytes, stats.used_memory_bytes
        on_gpu = self.model_info.device.is_gpu()
        usage = MemoryUsage(total, used, total - used, used if on_gpu else None, None if on_gpu else used, total, 0.0)
        usage.calculate_utilization()
        return usage

    def kv_utilization(self) -> float:
        """Share of the blocks that requests hold, 0-1.  Pure."""
        stats = self.kv_cache.stats()
        return _share_used(stats)

    def cache_metrics(self) -> dict[str, Any]:
        """The KV cache's counts as JSON.  Pure."""
        return dataclasses.asdict(self.kv_cache.stats())

    def health(self, crash: FerrumError | None, in_step: bool, when: datetime) -> HealthStatus:
        """The worst of the six parts.  Pure.  [EN-STATUS-2..3]"""
        parts = ComponentStatus(
            scheduler=self._scheduler(in_step, when),
            model_executor=_part("model", crash.message if crash else None, None, {}, when),
            tokenizer=ComponentHealth.healthy("tokenizer", last_check=when),
            kv_cache=self._kv_cache(when),
            memory_manager=ComponentHealth.healthy("memory", last_check=when),
            backend=ComponentHealth.healthy("backend", last_check=when),
        )
        worst = max((part.status for part in parts.entries()), key=ORDER.index)
        return HealthStatus(worst, parts, when)

    def _scheduler(self, in_step: bool, when: datetime) -> ComponentHealth:
        broken = None
        if not in_step:  # the books are balanced between steps only
            try:
                self.loop.check_invariants()
            except FerrumError as error:
                broken = error.message
        waiting, limit = self.loop.num_waiting, self.max_waiting_requests
        full = f"waiting queue nearly full: {waiting} of {limit}" if waiting >= NEARLY_FULL * limit else None
        numbers = {"waiting_requests": float(waiting), "running_requests": float(self.loop.num_running)}
        return _part("scheduler", broken, full, numbers, when)

    def _kv_cache(self, when: datetime) -> ComponentHealth:
        stats = self.kv_cache.stats()
        used = stats.total_blocks - stats.free_blocks
        full = f"nearly full: {used} of {stats.total_blocks} blocks" if _share_used(stats) >= NEARLY_FULL else None
        numbers = {"used_blocks": float(used), "total_blocks": float(stats.total_blocks)}
        return _part("kv_cache", None, full, numbers, when)


def _share_used(stats: CacheManagerStats) -> float:
    return (stats.total_blocks - stats.free_blocks) / stats.total_blocks if stats.total_blocks else 0.0


def _part(
    name: str, broken: str | None, warning: str | None, numbers: dict[str, float], when: datetime
) -> ComponentHealth:
    if broken is not None:
        return ComponentHealth(HealthStatusType.Unhealthy, broken, numbers, when)
    if warning is not None:
        return ComponentHealth(HealthStatusType.Warning, warning, numbers, when)
    return ComponentHealth(HealthStatusType.Healthy, f"{name} healthy", numbers, when)
