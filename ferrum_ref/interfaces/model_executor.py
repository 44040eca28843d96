"""`ModelExecutor`: token ids in, logits out, K/V written into the handle it was given. No tokenizer, no sampler.

Upstream: `ferrum_interfaces::model_executor` (0.7.0's traits plus 0.7.7's unified batches). The data are in
`executor_io`, `executor_status`, `executor_config` and `executor_speculative`, and re-exported here.
Clauses: MX-* (specs/model_executor.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.executor_config import (
    ExecutorAttentionConfig,
    ExecutorConfig,
    ExecutorMemoryConfig,
    ExecutorType,
    OptimizationConfig,
)
from ferrum_ref.interfaces.executor_io import (
    DecodeInput,
    DecodeOutput,
    PrefillInput,
    PrefillOutput,
    UnifiedBatch,
    UnifiedBatchItem,
)
from ferrum_ref.interfaces.executor_speculative import Proposal, SpeculativeDecodeOutput, SpeculativeSampling
from ferrum_ref.interfaces.executor_status import (
    AttentionType,
    ExecutorCapabilities,
    ExecutorMemoryUsage,
    ExecutorMetrics,
    ExecutorState,
    ExecutorStatus,
    MemoryRequirements,
)

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kv_cache import KvCacheHandle
    from ferrum_ref.interfaces.tensor import TensorRef
    from ferrum_ref.types.ids import TokenId
    from ferrum_ref.types.models import ModelInfo

__all__ = [
    "AttentionType", "BatchModelExecutor", "DecodeInput", "DecodeOutput", "ExecutorAttentionConfig",
    "ExecutorCapabilities", "ExecutorConfig", "ExecutorMemoryConfig", "ExecutorMemoryUsage", "ExecutorMetrics",
    "ExecutorRegistry", "ExecutorState", "ExecutorStatus", "ExecutorType", "MeasuredExecutor", "MemoryRequirements",
    "ModelExecutor", "ModelExecutorFactory", "OptimizationConfig", "PrefillInput", "PrefillOutput", "Proposal",
    "SpeculativeDecodeOutput", "SpeculativeExecutor", "SpeculativeSampling", "UnifiedBatch", "UnifiedBatchItem",
    "UnifiedExecutor",
]  # fmt: skip

Logits = npt.NDArray[np.float32]


@runtime_checkable
class UnifiedExecutor(Protocol):
    """The synchronous core an engine's step needs: one mixed forward.  [MX-UNIFIED-2]"""

    def execute_unified(self, batch: UnifiedBatch) -> list[Logits | None]:
        """One entry per item: logits `[V]` after its last token if final, else None. Writes the items' K/V."""


class ModelExecutor(ABC):
    """Tensor-level model driver. K/V live where the handle's block table says.  [MX-PREFILL-*, MX-DECODE-*; D-83]

    Errors: BackendError for a tensor's shape, ModelError for its contents, NotFoundError for an unknown cache,
    ResourceExhaustedError when the context is full, UnsupportedError for what is not offered.
    """

    @abstractmethod
    def info(self) -> ModelInfo:
        """Static model facts."""

    @abstractmethod
    async def prefill(self, input: PrefillInput) -> PrefillOutput:
        """Run a prompt, or its next chunk, causally; append its K/V to the handle."""

    @abstractmethod
    async def decode(self, input: DecodeInput) -> DecodeOutput:
        """Run one token per sequence over its cache, which grows by that token."""

    async def batch_decode(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        """`decode` of each, in order; the first error aborts.  [MX-BATCH-1]"""
        return [await self.decode(item) for item in inputs]

    async def batch_prefill(self, inputs: Sequence[PrefillInput]) -> list[PrefillOutput]:
        """`prefill` of each, in order; the first error aborts (0.7.7).  [MX-BATCH-1]"""
        return [await self.prefill(item) for item in inputs]

    async def forward(self, input: TensorRef) -> TensorRef:
        """Whole forward without a cache: ids `[T]`, `[B, T]` or embeddings `[B, T, E]` -> logits `[B, T, V]`.

        [MX-FORWARD-1]  Raises UnsupportedError unless overridden.
        """
        raise UnsupportedError("ModelExecutor.forward: this executor offers no cacheless forward; use prefill")

    def supports_native_unified_decode(self) -> bool:
        """True when `unified_decode` runs the whole batch in one pass (0.7.7)."""
        return False

    async def unified_decode(self, batch: UnifiedBatch) -> list[Logits | None]:
        """One mixed forward (0.7.7): logits `[V]` of the last token of final items, None for the others.

        Raises UnsupportedError unless overridden.  [MX-UNIFIED-2]
        """
        raise UnsupportedError("ModelExecutor.unified_decode: not offered here; use prefill and decode")

    def kv_capacity(self) -> int | None:
        """Tokens per request where fewer than the model's context; None = the context (0.7.7)."""
        return None

    async def truncate_kv(self, kv_cache: KvCacheHandle, new_len: int) -> None:
        """Roll back to `new_len` tokens (0.7.7).  Raises UnsupportedError if tokens would have to go.  [MX-TRUNCATE-1]

        Upstream's default ignores the call, which leaves rejected tokens in the cache.
        """
        if new_len < kv_cache.num_tokens():
            raise UnsupportedError(
                f"ModelExecutor.truncate_kv: cannot cut {kv_cache.cache_id()} from {kv_cache.num_tokens()} to {new_len}"
                " tokens; release the cache and prefill again"
            )

    async def forward_verify(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        """Successive tokens of ONE sequence (0.7.7): `decode` of each on the handle the previous one returned.

        The last element carries the final handle.  [MX-BATCH-2]
        """
        outputs: list[DecodeOutput] = []
        for item in inputs:
            step = replace(item, kv_cache=outputs[-1].kv_cache) if outputs else item
            outputs.append(await self.decode(step))
        return outputs

    @abstractmethod
    def capabilities(self) -> ExecutorCapabilities:
        """Static abilities."""

    @abstractmethod
    def status(self) -> ExecutorStatus:
        """Runtime counters."""

    async def warmup(self) -> None:
        """Prepare for the first request; default: nothing."""
        return

    async def shutdown(self) -> None:
        """Give everything back; default: nothing."""
        return

    def release_cache(self, cache_id: str) -> None:
        """Drop what is kept for `cache_id`; an unknown id is no error; default: nothing."""
        return

    def cache_metrics_snapshot(self) -> dict[str, Any] | None:
        """Cache counters as JSON, or None (0.7.7)."""
        return None

    def lora_metrics_snapshot(self) -> dict[str, Any] | None:
        """Adapter counters as JSON, or None (0.7.7)."""
        return None


class BatchModelExecutor(ModelExecutor):
    """Whole batches in one call. `batch_decode` is `ModelExecutor`'s own, made required (D-31).  [MX-BATCH-3..6]"""

    @abstractmethod
    async def batch_prefill(self, inputs: Sequence[PrefillInput]) -> list[PrefillOutput]:
        """Several prompts, order kept."""

    @abstractmethod
    async def batch_decode(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        """One token of several sequences, order kept."""

    @abstractmethod
    def optimal_batch_size(self) -> int:
        """The batch size that decodes the most tokens per second, as far as measured. Pure.  [MX-BATCH-5]"""

    @abstractmethod
    def supports_batch_size(self, batch_size: int) -> bool:
        """Would a batch of that many be taken. Pure.  [MX-BATCH-6]"""


class SpeculativeExecutor(ModelExecutor):
    """Verification of drafted tokens.  [MX-SPEC-1..6; D-24]"""

    @abstractmethod
    async def speculative_decode(
        self,
        input: DecodeInput,
        draft_tokens: Sequence[TokenId],
        acceptance_threshold: float,
        *,
        sampling: SpeculativeSampling | None = None,
    ) -> SpeculativeDecodeOutput:
        """Run `input`'s token and the drafts in one forward, accept a prefix of the drafts, forget the others' K/V.

        acceptance_threshold 0: lossless; greedy (the longest prefix equal to the target's argmax), or with `sampling`
        (an extension) by rejection sampling. t in (0, 1]: accept iff pT(token) >= t ("typical acceptance"): biased.
        Mutates storage and handle.  Raises InvalidParameterError for another threshold.  [MX-SPEC-1..6]
        """


class ModelExecutorFactory(ABC):
    """Builds executors from settings.  [MX-FACTORY-1..4]"""

    @abstractmethod
    async def create_executor(self, config: ExecutorConfig) -> ModelExecutor:
        """The kind the settings name.  Raises as `validate_config`, and what loading the model raises."""

    @abstractmethod
    async def create_batch_executor(self, config: ExecutorConfig) -> BatchModelExecutor:
        """The batch flavour.  Raises UnsupportedError where the kind has none; else as `create_executor`."""

    @abstractmethod
    def supported_types(self) -> list[ExecutorType]:
        """The kinds it builds. Pure."""

    @abstractmethod
    def validate_config(self, config: ExecutorConfig) -> None:
        """Raises ConfigError naming a bad setting, UnsupportedError naming one that is not offered. Pure."""


class ExecutorRegistry(ABC):
    """Executors by name.  [MX-REGISTRY-1]"""

    @abstractmethod
    def register(self, name: str, executor: ModelExecutor) -> None:
        """Keep it.  Raises AlreadyExistsError: the name is taken."""

    @abstractmethod
    def get(self, name: str) -> ModelExecutor | None:
        """The executor, or None. Pure."""

    @abstractmethod
    def remove(self, name: str) -> ModelExecutor | None:
        """Take it out, or None."""

    @abstractmethod
    def list_names(self) -> list[str]:
        """In order of registration. Pure."""

    @abstractmethod
    def get_metrics(self, name: str) -> ExecutorMetrics | None:
        """Its figures; None for an unknown name or an executor that measures none. Pure."""


@runtime_checkable
class MeasuredExecutor(Protocol):
    """An executor that can tell its performance (an extension: upstream's trait has no such method)."""

    def metrics(self) -> ExecutorMetrics:
        """Figures since construction. Pure.  [MX-METRICS-1]"""
