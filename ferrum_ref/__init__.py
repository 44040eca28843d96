"""ferrum-ref: what ferrum's inference contracts mean, exactly, in numpy.

The names here are those of upstream's crate root (`use ferrum_interfaces::X`): the contracts and the plain data they
exchange. Where one name has two definitions the root has upstream's choice: `SamplingConfig` is the sampler's pipeline,
`BackendConfig`, `TokenizerConfig` and `SamplingParams` are data records, `KernelSamplingParams` the kernels' (D-30).

`import ferrum_ref` loads numpy-level code only; frameworks live in backends that are found by entry point.
Clauses: TY-ROOT-1..2 (specs/types.md).
"""

from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.backend import BackendCapabilities, ComputeBackend, WeightLoader
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.engine import InferenceEngine
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    AttentionParams,
    KernelOps,
    KernelOpsDispatch,
    LinearOps,
    NormOps,
    PositionOps,
    QuantScheme,
    RoPEConfig,
    SamplingOps,
)
from ferrum_ref.interfaces.kernel_ops import SamplingParams as KernelSamplingParams
from ferrum_ref.interfaces.kv_cache import (
    AllocationRequest,
    BlockTable,
    CacheHandleStats,
    KvCacheHandle,
    KvCacheManager,
)
from ferrum_ref.interfaces.memory import DeviceMemoryManager, MemoryHandle, StreamHandle
from ferrum_ref.interfaces.model_builder import BuildOptions, ModelBuilder
from ferrum_ref.interfaces.model_executor import DecodeInput, DecodeOutput, ModelExecutor, PrefillInput, PrefillOutput
from ferrum_ref.interfaces.sampler import LogitsProcessor, Sampler, SamplingConfig, SamplingContext
from ferrum_ref.interfaces.scheduler import BatchHint, BatchPlan
from ferrum_ref.interfaces.scheduler import Scheduler as SchedulerInterface
from ferrum_ref.interfaces.tensor import TensorFactory, TensorLike, TensorOps, TensorRef
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer, Tokenizer, TokenizerInfo
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights
from ferrum_ref.types import (
    BackendConfig,
    BatchId,
    BlockId,
    ClientId,
    ComponentHealth,
    ComponentStatus,
    DataType,
    Device,
    EngineConfig,
    EngineMetrics,
    EngineStatus,
    FinishReason,
    HealthStatus,
    InferenceRequest,
    InferenceResponse,
    MemoryUsage,
    ModelId,
    ModelInfo,
    ModelSource,
    ModelType,
    Priority,
    RequestId,
    Result,
    SamplingParams,
    SchedulerConfig,
    SchedulerStats,
    SessionId,
    SpecialTokens,
    StreamChunk,
    TaskId,
    TokenId,
    TokenizerConfig,
)

__version__ = "0.1.0"

__all__ = [
    "ActivationOps",
    "AllocationRequest",
    "AttentionOps",
    "AttentionParams",
    "BackendCapabilities",
    "BackendConfig",
    "BatchHint",
    "BatchId",
    "BatchPlan",
    "BlockId",
    "BlockTable",
    "BuildOptions",
    "CacheHandleStats",
    "ClientId",
    "ComponentHealth",
    "ComponentStatus",
    "ComputeBackend",
    "DataType",
    "DecodeBackend",
    "DecodeInput",
    "DecodeOutput",
    "Device",
    "DeviceMemoryManager",
    "EngineConfig",
    "EngineMetrics",
    "EngineStatus",
    "FerrumError",
    "FinishReason",
    "HealthStatus",
    "IncrementalTokenizer",
    "InferenceEngine",
    "InferenceRequest",
    "InferenceResponse",
    "KernelOps",
    "KernelOpsDispatch",
    "KernelSamplingParams",
    "KvCacheHandle",
    "KvCacheManager",
    "LinearOps",
    "LogitsProcessor",
    "MemoryHandle",
    "MemoryUsage",
    "ModelBuilder",
    "ModelExecutor",
    "ModelId",
    "ModelInfo",
    "ModelSource",
    "ModelType",
    "NormOps",
    "PositionOps",
    "PrefillInput",
    "PrefillOutput",
    "Priority",
    "QuantScheme",
    "RequestId",
    "Result",
    "RoPEConfig",
    "Sampler",
    "SamplingConfig",
    "SamplingContext",
    "SamplingOps",
    "SamplingParams",
    "SchedulerConfig",
    "SchedulerInterface",
    "SchedulerStats",
    "SessionId",
    "SpecialTokens",
    "StreamChunk",
    "StreamHandle",
    "TaskId",
    "TensorFactory",
    "TensorLike",
    "TensorOps",
    "TensorRef",
    "TokenId",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerInfo",
    "TransformerConfig",
    "TransformerWeights",
    "WeightLoader",
    "__version__",
]
