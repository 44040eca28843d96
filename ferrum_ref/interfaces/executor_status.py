"""What a `ModelExecutor` says about itself: abilities, memory model, runtime counters.

Upstream: `ferrum_interfaces::model_executor`.  Clauses: MX-STATUS-1..2 (specs/model_executor.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ferrum_ref.errors import InvalidParameterError

if TYPE_CHECKING:
    from ferrum_ref.types.devices import DataType, Device


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
class MemoryRequirements:
    """A linear memory model, in bytes; `kv_cache_memory_per_token` counts K and V of ONE layer.  [MX-STATUS-1; D-83]"""

    parameter_memory: int
    activation_memory_per_token: int
    kv_cache_memory_per_token: int
    overhead_memory: int

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
class ExecutorCapabilities:
    """What the executor can do; static."""

    max_batch_size: int
    max_sequence_length: int
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
class ExecutorMemoryUsage:
    """Bytes reserved, in use, and at most in use so far; percent is 100 * used / allocated."""

    allocated_bytes: int
    used_bytes: int
    peak_bytes: int
    utilization_percent: float


@dataclass(frozen=True, slots=True)
class ExecutorStatus:
    """A snapshot of the counters; `last_operation` is a monotonic clock reading, never serialised.  [MX-STATUS-2]"""

    state: ExecutorState
    is_ready: bool
    current_batch_size: int
    prefill_operations: int
    decode_operations: int
    avg_prefill_time_ms: float
    avg_decode_time_ms: float
    memory_usage: ExecutorMemoryUsage
    last_operation: float | None
