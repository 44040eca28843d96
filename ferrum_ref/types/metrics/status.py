"""Snapshots of an engine, its scheduler and its caches; `ferrum_ref.types.metrics` re-exports these names.

Clauses: TY-METRICS-1, TY-METRICS-4 (specs/types.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.record import F32, F64, U64, Record, Usize


@dataclass(slots=True)
class MemoryUsage(Record):
    """Memory in bytes; mutable."""

    total_bytes: Usize
    used_bytes: Usize
    free_bytes: Usize
    gpu_memory_bytes: Usize | None
    cpu_memory_bytes: Usize | None
    cache_memory_bytes: Usize
    utilization_percent: F32

    def calculate_utilization(self) -> None:
        """Set utilization_percent to 100 * used / total, or 0 when total is 0.  [TY-METRICS-1]"""
        self.utilization_percent = 100.0 * self.used_bytes / self.total_bytes if self.total_bytes else 0.0


@dataclass(frozen=True, slots=True)
class EngineStatus(Record):
    """Snapshot of an engine."""

    is_ready: bool
    loaded_models: list[ModelId]
    active_requests: Usize
    queued_requests: Usize
    memory_usage: MemoryUsage
    uptime_seconds: U64
    last_heartbeat: datetime
    version: str


@dataclass(frozen=True, slots=True)
class SchedulerStats(Record):
    """Snapshot of a scheduler.  [D-63]

    waiting, running, preempted   requests in that state now; completed, failed, cancelled: since the start
    avg_wait_time_ms              from submission to the start of work; avg_execution_time_ms: from there to the end
    queue_utilization             waiting / room in the queue, 0-1
    """

    waiting_requests: Usize
    running_requests: Usize
    preempted_requests: Usize
    completed_requests: U64
    failed_requests: U64
    cancelled_requests: U64
    avg_wait_time_ms: F64
    avg_execution_time_ms: F64
    throughput_rps: F64
    queue_utilization: F32


@dataclass(frozen=True, slots=True)
class PrefixCacheStats(Record):
    """Snapshot of a prefix cache."""

    cached_prefixes: Usize
    prefix_hit_rate: F32
    avg_prefix_length: F32
    memory_saved_bytes: U64


@dataclass(frozen=True, slots=True)
class CacheStats(Record):
    """Snapshot of a key/value cache."""

    total_blocks: Usize
    used_blocks: Usize
    free_blocks: Usize
    cache_hit_rate: F32
    cache_hits: U64
    cache_misses: U64
    eviction_count: U64
    avg_block_utilization: F32
    prefix_cache_stats: PrefixCacheStats | None
