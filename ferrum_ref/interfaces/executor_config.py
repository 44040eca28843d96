"""How an executor is to be built: model, device, attention, memory, optimisations, and what it measures about itself.

Upstream: `ferrum_interfaces::model_executor`.  Clauses: MX-CONFIG-1..2, MX-FACTORY-1..4 (specs/model_executor.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ferrum_ref.interfaces.executor_status import AttentionType
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.models import ModelInfo
from ferrum_ref.types.record import F32, U8, Json, Record, Usize


class ExecutorType(Enum):
    """Executor kinds."""

    Sequential = "Sequential"
    Batch = "Batch"
    ContinuousBatch = "ContinuousBatch"
    Speculative = "Speculative"
    PipelineParallel = "PipelineParallel"
    TensorParallel = "TensorParallel"


@dataclass(frozen=True, slots=True)
class ExecutorAttentionConfig(Record):
    """Which attention to run. `block_size` in tokens; `sliding_window_size` in tokens, None: no window."""

    attention_type: AttentionType
    enable_flash_attention: bool
    enable_paged_attention: bool
    block_size: Usize | None
    sliding_window_size: Usize | None


@dataclass(frozen=True, slots=True)
class ExecutorMemoryConfig(Record):
    """K/V memory. `memory_pool_size` in bytes, None: as much as the limits can use; `max_memory_usage` in (0, 1]."""

    enable_memory_pooling: bool
    memory_pool_size: Usize | None
    enable_kv_cache_sharing: bool
    max_memory_usage: F32


@dataclass(frozen=True, slots=True)
class OptimizationConfig(Record):
    """Optimisation switches; `optimization_level` 0 to 3."""

    enable_cuda_graphs: bool
    enable_kernel_fusion: bool
    enable_mixed_precision: bool
    optimization_level: U8
    custom_flags: dict[str, bool]


@dataclass(frozen=True, slots=True)
class ExecutorConfig(Record):
    """Everything an executor factory is told.  [MX-CONFIG-1]

    `executor_options` is JSON; the reference's factory reads "executor_type", the name of an `ExecutorType`.
    """

    model_info: ModelInfo
    device: Device
    dtype: DataType
    max_batch_size: Usize
    max_sequence_length: Usize
    attention_config: ExecutorAttentionConfig
    memory_config: ExecutorMemoryConfig
    optimization_config: OptimizationConfig
    executor_options: dict[str, Json]
