"""Settings of an engine and of its parts, with upstream's defaults (version 0.7.0).

Upstream: `ferrum_types::config`.  No setting is checked here beyond its width; the part that uses it checks it.
Clauses: TY-CONFIG-1..2 (specs/types.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import timedelta

from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo
from ferrum_ref.types.record import F32, U8, U32, U64, Json, Record, Usize
from ferrum_ref.types.sampling import SamplingParams, SamplingPresets


class SchedulingPolicy(enum.Enum):
    """Order in which requests are served."""

    FCFS = "FCFS"
    Priority = "Priority"
    FairShare = "FairShare"
    SJF = "SJF"
    RoundRobin = "RoundRobin"
    ContinuousBatch = "ContinuousBatch"


class KvCacheType(enum.Enum):
    """Layout of the key/value cache."""

    Contiguous = "Contiguous"
    Paged = "Paged"
    Tree = "Tree"


class BackendType(enum.Enum):
    """Upstream's kinds of backend."""

    Candle = "Candle"
    OnnxRuntime = "OnnxRuntime"
    TensorRT = "TensorRT"
    Custom = "Custom"


class TokenizerType(enum.Enum):
    """Tokenisation algorithm."""

    BPE = "BPE"
    WordPiece = "WordPiece"
    SentencePiece = "SentencePiece"
    Tiktoken = "Tiktoken"
    Custom = "Custom"


class TruncationStrategy(enum.Enum):
    """Which side is dropped."""

    TruncateStart = "TruncateStart"
    TruncateEnd = "TruncateEnd"
    TruncateBoth = "TruncateBoth"


class PaddingStrategy(enum.Enum):
    """To which length is padded; `None_` is upstream's `None`."""

    None_ = "None"
    MaxLength = "MaxLength"
    FixedLength = "FixedLength"


@dataclass(frozen=True, slots=True)
class TruncationConfig(Record):
    """Truncation of a prompt."""

    max_length: Usize
    strategy: TruncationStrategy


@dataclass(frozen=True, slots=True)
class PaddingConfig(Record):
    """Padding of a batch."""

    strategy: PaddingStrategy
    token_id: U32
    target_length: Usize | None


@dataclass(frozen=True, slots=True)
class TokenizerConfig(Record):
    """Tokenizer settings."""

    tokenizer_type: TokenizerType = TokenizerType.BPE
    tokenizer_path: str | None = None
    enable_fast: bool = True
    add_special_tokens: bool = True
    truncation: TruncationConfig | None = None
    padding: PaddingConfig | None = None


@dataclass(frozen=True, slots=True)
class EngineModelConfig(Record):
    """Model settings of an engine."""

    model_id: ModelId = ModelId("default")  # noqa: RUF009  (frozen: safe to share)
    model_info: ModelInfo | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()


@dataclass(frozen=True, slots=True)
class SchedulerConfig(Record):
    """Scheduler settings."""

    policy: SchedulingPolicy = SchedulingPolicy.Priority
    max_waiting_requests: Usize = 1000
    max_running_requests: Usize = 256
    enable_preemption: bool = True
    enable_load_balancing: bool = False
    fair_share_weights: dict[str, F32] = field(default_factory=dict)
    enable_sla_enforcement: bool = False


@dataclass(frozen=True, slots=True)
class KvCacheConfig(Record):
    """Key/value cache settings."""

    cache_type: KvCacheType = KvCacheType.Contiguous
    block_size: Usize = 16
    max_blocks: Usize = 1024
    enable_compression: bool = False
    compression_ratio: F32 = 0.5
    enable_multi_level: bool = True
    swap_threshold: F32 = 0.8
    enable_prefix_caching: bool = True
    prefix_cache_size: Usize = 100


@dataclass(frozen=True, slots=True)
class MemoryConfig(Record):
    """Memory settings."""

    pool_size: Usize | None = None
    enable_pooling: bool = True
    alignment: Usize = 256
    enable_defragmentation: bool = False
    defragmentation_threshold: F32 = 0.7
    enable_memory_stats: bool = True
    pressure_warning_threshold: F32 = 0.8
    pressure_critical_threshold: F32 = 0.95


@dataclass(frozen=True, slots=True)
class BackendConfig(Record):
    """Backend settings."""

    backend_type: BackendType = BackendType.Candle
    device: Device = Device.CPU
    dtype: DataType = DataType.FP16
    enable_optimizations: bool = True
    optimization_level: U8 = 2
    enable_cuda_graphs: bool = False
    enable_kernel_fusion: bool = True
    backend_options: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SecurityConfig(Record):
    """Security settings of a server; not a part of EngineConfig."""

    enable_auth: bool = False
    api_keys: list[str] = field(default_factory=list, repr=False)
    enable_rate_limiting: bool = True
    rate_limit_rpm: U32 = 60
    enable_content_filter: bool = False
    max_prompt_length: Usize = 32768
    enable_prompt_validation: bool = True
    allowed_extensions: list[str] = field(default_factory=lambda: ["txt", "json"])


@dataclass(frozen=True, slots=True)
class SamplingConfig(Record):
    """Sampling settings of an engine (the pipeline of that name is `interfaces.sampler.SamplingConfig`)."""

    default_params: SamplingParams = field(default_factory=SamplingParams)
    presets: SamplingPresets = field(default_factory=SamplingPresets)
    enable_custom_processors: bool = False


@dataclass(frozen=True, slots=True)
class MonitoringConfig(Record):
    """Monitoring settings."""

    enable_metrics: bool = True
    enable_tracing: bool = True
    export_interval: timedelta = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class BatchConfig(Record):
    """Batching settings."""

    max_batch_size: Usize = 16
    max_wait_ms: U64 = 8
    enable_dynamic: bool = True
    enable_continuous: bool = False


@dataclass(frozen=True, slots=True)
class EngineConfig(Record):
    """All settings of an engine."""

    model: EngineModelConfig = field(default_factory=EngineModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    batching: BatchConfig = field(default_factory=BatchConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
