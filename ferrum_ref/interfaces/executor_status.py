"""What a `ModelExecutor` says about itself: abilities, memory model, runtime counters, performance figures.

Upstream: `ferrum_interfaces::model_executor`.  Clauses: MX-STATUS-1..3, MX-METRICS-1..3 (specs/model_executor.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.record import F32, F64, U64, Record, Usize


class AttentionType(Enum):
    """Attention kinds; upstream mixes how heads are shared with how the kernel works."""

    MultiHead = "MultiHead"
    MultiQuery = "MultiQuery"
    GroupedQuery = "GroupedQuery"
    Flash = "Flash"
    Paged = "Paged"
    SlidingWindow = "SlidingWindow"


class ExecutorState(Enum):
    """Lifecycle of an executor."""

    Initializing = "Initializing"
    Ready = "Ready"
    Busy = "Busy"
    Error = "Error"
    Shutdown = "Shutdown"


@dataclass(frozen=True, slots=True)
class MemoryRequirements(Record):
    """A linear memory model, in bytes; `kv_cache_memory_per_token` counts K and V of ONE layer.  [MX-STATUS-1; D-83]"""

    parameter_memory: U64
    activation_memory_per_token: Usize
    kv_cache_memory_per_token: Usize
    overhead_memory: U64

    def calculate_total_memory(self, batch_size: int, sequence_length: int, num_layers: int) -> int:
        """parameters + activation * B * S + kv * B * S * num_layers + overhead, in bytes.  Pure.  [MX-STATUS-1]

        Raises InvalidParameterError for a negative count.
        """
        counts = {"batch_size": batch_size, "sequence_length": sequence_length, "num_layers": num_layers}
        for name, value in counts.items():
            if value < 0:
                raise InvalidParameterError(f"calculate_total_memory: {name} must be >= 0, got {value}")
        tokens = batch_size * sequence_length
        per_token = self.activation_memory_per_token + self.kv_cache_memory_per_token * num_layers
        return self.parameter_memory + per_token * tokens + self.overhead_memory


@dataclass(frozen=True, slots=True)
class ExecutorCapabilities(Record):
    """What the executor can do; static."""

    max_batch_size: Usize
    max_sequence_length: Usize
    attention_mechanisms: list[AttentionType]
    supports_dynamic_batching: bool
    supports_continuous_batching: bool
    supports_speculative_decoding: bool
    supports_tensor_parallelism: bool
    supports_pipeline_parallelism: bool
    supported_dtypes: list[DataType]
    supported_devices: list[Device]
    memory_requirements: MemoryRequirements


@dataclass(frozen=True, slots=True)
class ExecutorMemoryUsage(Record):
    """Bytes reserved, in use, and at most in use so far; percent is 100 * used / allocated."""

    allocated_bytes: Usize
    used_bytes: Usize
    peak_bytes: Usize
    utilization_percent: F32


@dataclass(frozen=True, slots=True)
class ExecutorStatus(Record):
    """A snapshot of the counters; `last_operation` is a monotonic clock reading, never serialised.  [MX-STATUS-2]"""

    state: ExecutorState
    is_ready: bool
    current_batch_size: Usize
    prefill_operations: U64
    decode_operations: U64
    avg_prefill_time_ms: F64
    avg_decode_time_ms: F64
    memory_usage: ExecutorMemoryUsage
    last_operation: float | None


@dataclass(frozen=True, slots=True)
class ExecutorMetrics(Record):
    """Performance so far: latencies in ms, throughput in tokens per second, the last two in [0, 1].  [MX-METRICS-1..3]

    An operation's latency is the whole time of the forward it took part in: that is what its request waits for. (The
    averages of `ExecutorStatus` are shares of that time instead.)
    """

    total_operations: U64
    prefill_operations: U64
    decode_operations: U64
    avg_prefill_latency: F64
    avg_decode_latency: F64
    p95_prefill_latency: F64
    p95_decode_latency: F64
    throughput_tps: F64
    memory_efficiency: F32
    batch_utilization: F32
