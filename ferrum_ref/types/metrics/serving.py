"""Batches, latencies, throughput, and what models and requests did; `ferrum_ref.types.metrics` re-exports these names.

Clause: TY-METRICS-4 (specs/types.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ferrum_ref.types.ids import ClientId, ModelId, RequestId
from ferrum_ref.types.record import F32, F64, U32, U64, Record, Usize


@dataclass(frozen=True, slots=True)
class BatchingMetrics(Record):
    """Batches so far: mean size, share of the largest size used (0-1), mean duration."""

    avg_batch_size: F32
    batch_utilization: F32
    batches_created: U64
    batches_completed: U64
    avg_batch_time_ms: F64
    tokens_per_second: F64


@dataclass(frozen=True, slots=True)
class LatencyMetrics:
    """Latencies of finished requests, in milliseconds: mean, percentiles, first token, gap between tokens."""

    avg_latency_ms: F64
    p50_latency_ms: F64
    p90_latency_ms: F64
    p95_latency_ms: F64
    p99_latency_ms: F64
    p999_latency_ms: F64
    avg_ttft_ms: F64
    avg_inter_token_latency_ms: F64


@dataclass(frozen=True, slots=True)
class ThroughputMetrics:
    """Work per second of the wall clock."""

    requests_per_second: F64
    tokens_per_second: F64
    characters_per_second: F64
    batches_per_second: F64
    peak_tokens_per_second: F64


@dataclass(frozen=True, slots=True)
class PhaseMetrics(Record):
    """One phase of a model, prefill or decode."""

    operations: U64
    avg_time_ms: F64
    total_time_ms: F64
    tokens_processed: U64


@dataclass(frozen=True, slots=True)
class ModelMetrics(Record):
    """What one model has done."""

    model_id: ModelId
    forward_passes: U64
    avg_forward_time_ms: F64
    prefill_metrics: PhaseMetrics
    decode_metrics: PhaseMetrics
    tokens_generated: U64


@dataclass(frozen=True, slots=True)
class RequestMetrics(Record):
    """What happened to one request; times in milliseconds."""

    request_id: RequestId
    client_id: ClientId | None
    model_id: ModelId
    created_at: datetime
    completed_at: datetime | None
    total_time_ms: U64
    queue_time_ms: U64
    prefill_time_ms: U64
    decode_time_ms: U64
    input_tokens: Usize
    output_tokens: Usize
    was_preempted: bool
    preemption_count: U32
