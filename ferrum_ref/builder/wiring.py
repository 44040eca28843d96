"""From something that decodes to a ModelExecutor: paged keys and values, their manager, the facts.

Clauses: MB-BUILD-2..4 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ferrum_ref.errors import ModelError, ResourceExhaustedError
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch, RaggedDecoder
from ferrum_ref.interfaces.model_builder import ModelDimensions, OptimizationResult
from ferrum_ref.interfaces.model_executor import AttentionType, ExecutorCapabilities, MemoryRequirements
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.kv_cache.storage_contiguous import KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.serialization import to_jsonable
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType


class BuiltDecoder(RaggedDecoder, Protocol):
    """What both decoders offer beside running."""

    @property
    def dtype(self) -> DataType: ...

    @property
    def device(self) -> Device: ...


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What is known of a model once it is read."""

    model_id: ModelId
    model_type: ModelType
    dimensions: ModelDimensions
    head_dim: int
    num_parameters: int
    parameter_bytes: int
    max_batch_size: int
    num_blocks: int | None
    block_size: int
    optimizations: Mapping[str, OptimizationResult] = field(default_factory=dict)

    @property
    def num_kv_heads(self) -> int:
        found = self.dimensions.num_kv_heads
        return self.dimensions.num_heads if found is None else found

    def blocks_for(self, max_tokens: int) -> int:
        """Blocks asked for, or enough for max_batch_size sequences of full length."""
        return self.num_blocks or self.max_batch_size * -(-max_tokens // self.block_size)


def make_executor(decoder: BuiltDecoder, plan: Blueprint, backend: ComputeBackend) -> PagedModelExecutor:
    """An executor with its own empty cache; prefill without a handle allocates one.  [MB-BUILD-2..4]

    Raises ResourceExhaustedError if the cache does not fit into memory.
    """
    kv_shape = KvShape(plan.dimensions.num_layers, plan.num_kv_heads, plan.head_dim, decoder.dtype, decoder.device)
    num_blocks = plan.blocks_for(decoder.max_tokens)
    try:
        storage = PagedKvStorage(backend, kv_shape, num_blocks, plan.block_size)
    except (MemoryError, ResourceExhaustedError):
        size = num_blocks * plan.block_size * kv_shape.bytes_per_token()
        raise ResourceExhaustedError(
            f"build: a cache of {num_blocks} blocks takes {size} bytes, which there are not; give num_blocks"
        ) from None
    manager = PagedKvCacheManager(num_blocks, plan.block_size, storage=storage, dtype=decoder.dtype)
    return PagedModelExecutor(
        decoder,
        storage,
        backend.tensor_factory(),
        _info(decoder, plan, backend),
        _capabilities(decoder, plan, kv_shape),
        lender=manager,
        head_dim=plan.head_dim,
    )


def try_out(decoder: BuiltDecoder, plan: Blueprint, backend: ComputeBackend) -> None:
    """Run one token through a cache of its own.  [MB-BUILD-5]

    Raises ModelError unless its logits are V finite numbers.
    """
    kv_shape = KvShape(plan.dimensions.num_layers, plan.num_kv_heads, plan.head_dim, decoder.dtype, decoder.device)
    storage = PagedKvStorage(backend, kv_shape, 1, 1)
    logits = decoder.forward(ForwardBatch.build([[0]], [0]), storage.bind([[0]], [0], [1])).to_numpy()
    values = np.asarray(logits, dtype=np.float32)
    if values.shape != (1, plan.dimensions.vocab_size) or not np.isfinite(values).all():
        num_bad = int((~np.isfinite(values)).sum())
        raise ModelError(
            f"build: token 0 gave logits of shape {values.shape}, {num_bad} of them not finite; expected"
            f" {plan.dimensions.vocab_size} finite numbers: the weights are damaged or do not belong to this model"
        )


def _info(decoder: BuiltDecoder, plan: Blueprint, backend: ComputeBackend) -> ModelInfo:
    sizes = plan.dimensions
    metadata: dict[str, Any] = {"head_dim": plan.head_dim, "backend": backend.name()}
    if plan.optimizations:
        metadata["optimizations"] = {name: to_jsonable(result) for name, result in plan.optimizations.items()}
    return ModelInfo(
        model_id=plan.model_id,
        model_type=plan.model_type,
        num_parameters=plan.num_parameters,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=plan.num_kv_heads,
        vocab_size=sizes.vocab_size,
        max_sequence_length=decoder.max_tokens,
        dtype=decoder.dtype,
        device=decoder.device,
        version=None,
        license=None,
        metadata=metadata,
    )


def _capabilities(decoder: BuiltDecoder, plan: Blueprint, kv_shape: KvShape) -> ExecutorCapabilities:
    sizes, element = plan.dimensions, decoder.dtype.size_bytes()
    sharing = AttentionType.MultiHead if plan.num_kv_heads == sizes.num_heads else AttentionType.GroupedQuery
    if plan.num_kv_heads == 1 < sizes.num_heads:
        sharing = AttentionType.MultiQuery
    return ExecutorCapabilities(
        max_batch_size=plan.max_batch_size,
        max_sequence_length=decoder.max_tokens,
        attention_mechanisms=[sharing, AttentionType.Paged],
        supports_dynamic_batching=True,
        supports_continuous_batching=True,
        supports_speculative_decoding=False,
        supports_tensor_parallelism=False,
        supports_pipeline_parallelism=False,
        supported_dtypes=[decoder.dtype],
        supported_devices=[decoder.device],
        memory_requirements=MemoryRequirements(
            parameter_memory=plan.parameter_bytes,
            # residual, norm, gate and up, their product: what one token holds at a layer's widest point
            activation_memory_per_token=(2 * sizes.hidden_size + 3 * (sizes.intermediate_size or 0)) * element,
            kv_cache_memory_per_token=kv_shape.bytes_per_token() // sizes.num_layers,
            overhead_memory=decoder.max_tokens * plan.head_dim * element,  # rotary tables
        ),
    )
