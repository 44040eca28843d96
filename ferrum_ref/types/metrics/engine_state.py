"""An engine's exported state, warm-up, speculation, hardware limits; `ferrum_ref.types.metrics` re-exports these names.

Clause: TY-METRICS-4 (specs/types.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from ferrum_ref.types.config import EngineConfig
from ferrum_ref.types.devices import Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.metrics.totals import EngineMetrics
from ferrum_ref.types.models import ModelConfig
from ferrum_ref.types.record import F32, F64, U64, Json, Record, Usize


@dataclass(frozen=True, slots=True)
class EngineRequestProgress(Record):
    """How far a request has come."""

    tokens_processed: Usize = 0
    tokens_remaining: Usize = 0
    elapsed_time_ms: U64 = 0
    estimated_remaining_ms: U64 | None = None


@dataclass(frozen=True, slots=True)
class EngineRequestState:
    """One request of an exported state."""

    request_id: RequestId
    current_phase: str
    progress: EngineRequestProgress
    allocated_resources: dict[str, Json]


@dataclass(frozen=True, slots=True)
class EngineState:
    """An engine's exported state."""

    config: EngineConfig
    metrics: EngineMetrics
    component_states: dict[str, Json]
    active_requests: list[EngineRequestState]
    timestamp: datetime


@dataclass(frozen=True, slots=True)
class SpeculationConfig(Record):
    """Speculative decoding: draft tokens a round; an acceptance threshold of 0 means the lossless rule (D-24)."""

    speculation_depth: Usize
    acceptance_threshold: F32
    draft_model_config: ModelConfig | None


@dataclass(frozen=True, slots=True)
class WarmupResult(Record):
    """Outcome of a warm-up."""

    requests_processed: Usize = 0
    total_time_ms: U64 = 0
    avg_latency_ms: F64 = 0.0
    memory_allocated_bytes: U64 = 0
    success: bool = False
    issues: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LatencyRequirements(Record):
    """Latency targets in milliseconds: 95th and 99th percentile, and the absolute limit."""

    target_p95_latency_ms: U64
    target_p99_latency_ms: U64
    max_latency_ms: U64


@dataclass(frozen=True, slots=True)
class RequestCharacteristics(Record):
    """A typical request."""

    avg_input_tokens: Usize
    avg_output_tokens: Usize
    typical_batch_size: Usize
    latency_requirements: LatencyRequirements


@dataclass(frozen=True, slots=True)
class HardwareConstraints(Record):
    """What a recommended configuration must fit; memory in bytes, rate in requests a second."""

    available_devices: list[Device]
    total_memory: U64
    expected_request_rate: F32
    request_characteristics: RequestCharacteristics
