"""Executors from `ExecutorConfig`: what the settings mean, and which of them are refused.

`enable_*` set to True asks for something: where it is not offered that is UnsupportedError, never a silent no. False
asks for nothing, except that without `enable_paged_attention` a sequence is one block, and without
`enable_kv_cache_sharing` there is no prefix cache. `enable_flash_attention` alone asks for no more than "if available".
Clauses: MX-CONFIG-1..2, MX-FACTORY-1..5 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ferrum_ref.errors import ConfigError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.backend import BackendCapabilities
from ferrum_ref.interfaces.model_executor import (
    AttentionType,
    BatchModelExecutor,
    ExecutorConfig,
    ExecutorType,
    ModelExecutor,
    ModelExecutorFactory,
)
from ferrum_ref.types.devices import DataType

DEFAULT_BLOCK_SIZE_TOKENS = 16
HIGHEST_OPTIMIZATION_LEVEL = 3
KNOWN_OPTIONS = frozenset({"executor_type"})
OFFERED = (ExecutorType.Sequential, ExecutorType.Batch, ExecutorType.ContinuousBatch, ExecutorType.Speculative)
MODEL_DTYPES = (DataType.FP32, DataType.FP16, DataType.BF16)
BATCH_KINDS = (ExecutorType.Batch, ExecutorType.ContinuousBatch)


@dataclass(frozen=True, slots=True)
class ExecutorPlan:
    """What is to be built: its kind, its blocks, and its limits."""

    kind: ExecutorType
    num_blocks: int
    block_size: int
    max_tokens: int
    max_batch_size: int
    enable_prefix_caching: bool


Build = Callable[[ExecutorConfig, ExecutorType], ModelExecutor]


class ConfiguredExecutorFactory(ModelExecutorFactory):
    """Checks settings, then has the executor built.  [MX-FACTORY-1..5]"""

    def __init__(self, build: Build, capabilities: BackendCapabilities, *, has_fused_kernels: bool = True) -> None:
        """build(config, kind) wires one executor of an offered kind; `capabilities` are its backend's."""
        self._build = build
        self._capabilities = capabilities
        self._has_fused_kernels = has_fused_kernels

    async def create_executor(self, config: ExecutorConfig) -> ModelExecutor:
        """The kind that `executor_options["executor_type"]` names; Sequential without it."""
        self.validate_config(config)
        return self._build(config, executor_type(config) or ExecutorType.Sequential)

    async def create_batch_executor(self, config: ExecutorConfig) -> BatchModelExecutor:
        """Batch or ContinuousBatch; Batch where no kind is named.  Raises UnsupportedError for the other kinds."""
        self.validate_config(config)
        kind = executor_type(config) or ExecutorType.Batch
        built = self._build(config, kind) if kind in BATCH_KINDS else None
        if not isinstance(built, BatchModelExecutor):
            raise UnsupportedError(f"create_batch_executor: {kind.value} has no batch flavour; use create_executor")
        return built

    def supported_types(self) -> list[ExecutorType]:
        return list(OFFERED)

    def validate_config(self, config: ExecutorConfig) -> None:
        """Raises ConfigError naming a bad setting, UnsupportedError naming one not offered. Pure.  [MX-FACTORY-2..3]"""
        _check_options(config)
        _check_numbers(config)
        _check_attention(config, self._capabilities)
        self._check_offers(config)

    def _check_offers(self, config: ExecutorConfig) -> None:
        wanted = config.optimization_config
        have = self._capabilities
        refused = {
            f"device {config.device}": config.device not in have.supported_devices,
            f"dtype {config.dtype.name}": config.dtype not in MODEL_DTYPES or config.dtype not in have.supported_dtypes,
            "enable_cuda_graphs": wanted.enable_cuda_graphs and not have.supports_cuda_graphs,
            "enable_kernel_fusion": wanted.enable_kernel_fusion and not self._has_fused_kernels,
            "enable_mixed_precision (it needs a 16-bit dtype)": wanted.enable_mixed_precision
            and config.dtype not in (DataType.FP16, DataType.BF16),
        }
        refused |= {f"custom_flags[{name!r}]": value for name, value in wanted.custom_flags.items()}
        for name, is_refused in refused.items():
            if is_refused:
                raise UnsupportedError(f"ExecutorConfig: {name} is not offered by this backend; leave it off")


def executor_type(config: ExecutorConfig) -> ExecutorType | None:
    """The kind the options name, or None. Pure.  Raises ConfigError for an unknown name."""
    name = config.executor_options.get("executor_type")
    if name is None:
        return None
    for kind in ExecutorType:
        if kind.value == name:
            return kind
    known = ", ".join(kind.value for kind in ExecutorType)
    raise ConfigError(f"ExecutorConfig: executor_options.executor_type is {name!r}; expected one of {known}")


def plan_executor(config: ExecutorConfig, kind: ExecutorType, kv_bytes_per_token: int) -> ExecutorPlan:
    """Blocks and limits that the settings ask for. Pure.  [MX-FACTORY-4]

    blocks = min(floor(memory_pool_size * max_memory_usage / bytes of a block), what max_batch_size sequences of
    max_sequence_length tokens need); the latter alone without a memory_pool_size (times max_memory_usage).
    Raises ResourceExhaustedError if not one block fits.
    """
    attention, memory = config.attention_config, config.memory_config
    block_size = attention.block_size or DEFAULT_BLOCK_SIZE_TOKENS
    if not attention.enable_paged_attention:
        block_size = config.max_sequence_length
    most = config.max_batch_size * -(-config.max_sequence_length // block_size)
    block_bytes = block_size * kv_bytes_per_token
    pool_bytes = memory.memory_pool_size if memory.memory_pool_size is not None else most * block_bytes
    num_blocks = min(most, int(pool_bytes * memory.max_memory_usage) // block_bytes)
    if num_blocks < 1:
        raise ResourceExhaustedError(
            f"ExecutorConfig: one block of {block_size} tokens takes {block_bytes} bytes, but only"
            f" {memory.max_memory_usage:g} of {pool_bytes} may be used; give more memory or make blocks smaller"
        )
    return ExecutorPlan(
        kind, num_blocks, block_size, config.max_sequence_length, config.max_batch_size, memory.enable_kv_cache_sharing
    )


def _check_options(config: ExecutorConfig) -> None:
    unknown = sorted(set(config.executor_options) - KNOWN_OPTIONS)
    if unknown:
        raise ConfigError(f"ExecutorConfig: unknown executor_options {unknown}; known: {sorted(KNOWN_OPTIONS)}")
    kind = executor_type(config)
    if kind is not None and kind not in OFFERED:
        raise UnsupportedError(
            f"ExecutorConfig: executor_type {kind.value} is not offered; expected one of"
            f" {', '.join(kind.value for kind in OFFERED)}"
        )


def _check_numbers(config: ExecutorConfig) -> None:
    attention, memory, limit = config.attention_config, config.memory_config, config.model_info.max_sequence_length
    rules = (
        ("max_batch_size", config.max_batch_size, config.max_batch_size >= 1, ">= 1"),
        ("max_sequence_length", config.max_sequence_length, 1 <= config.max_sequence_length <= limit, f"1 to {limit}"),
        ("attention_config.block_size", attention.block_size, attention.block_size != 0, ">= 1 or None"),
        ("memory_config.memory_pool_size", memory.memory_pool_size, memory.memory_pool_size != 0, ">= 1 or None"),
        (
            "memory_config.max_memory_usage",
            memory.max_memory_usage,
            0 < memory.max_memory_usage <= 1,
            "a fraction above 0, up to 1",
        ),
        (
            "optimization_config.optimization_level",
            config.optimization_config.optimization_level,
            config.optimization_config.optimization_level <= HIGHEST_OPTIMIZATION_LEVEL,
            f"0 to {HIGHEST_OPTIMIZATION_LEVEL}",
        ),
    )
    for name, value, is_good, expected in rules:
        if not is_good:
            raise ConfigError(f"ExecutorConfig: {name} is {value}, expected {expected}")
    if memory.memory_pool_size is not None and not memory.enable_memory_pooling:
        raise ConfigError("ExecutorConfig: memory_config.memory_pool_size needs enable_memory_pooling")


def _check_attention(config: ExecutorConfig, capabilities: BackendCapabilities) -> None:
    attention, info = config.attention_config, config.model_info
    sharing = sharing_of(info.num_heads, info.num_kv_heads)
    kind = attention.attention_type
    if kind in (AttentionType.MultiHead, AttentionType.MultiQuery, AttentionType.GroupedQuery) and kind is not sharing:
        raise ConfigError(
            f"ExecutorConfig: attention_type is {kind.value}, but {info.num_heads} heads over {info.num_kv_heads} K/V"
            f" heads are {sharing.value}"
        )
    if kind is AttentionType.Paged and not attention.enable_paged_attention:
        raise ConfigError("ExecutorConfig: attention_type is Paged, but enable_paged_attention is False")
    if (kind is AttentionType.SlidingWindow) != (attention.sliding_window_size is not None):
        raise ConfigError(
            "ExecutorConfig: sliding_window_size goes with attention_type SlidingWindow, and only with it"
        )
    if kind is AttentionType.Flash and not capabilities.supports_flash_attention:
        raise UnsupportedError("ExecutorConfig: attention_type Flash is not offered by this backend; use Paged")


def sharing_of(num_heads: int, num_kv_heads: int) -> AttentionType:
    """How query heads share K/V heads. Pure."""
    if num_kv_heads == num_heads:
        return AttentionType.MultiHead
    return AttentionType.MultiQuery if num_kv_heads == 1 else AttentionType.GroupedQuery
