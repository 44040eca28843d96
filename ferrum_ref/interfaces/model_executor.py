"""`ModelExecutor`: token ids in, logits out, K/V written into the handle it was given. No tokenizer, no sampler.

Upstream: `ferrum_interfaces::model_executor` (0.7.0's trait plus 0.7.7's unified batches).
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
from ferrum_ref.interfaces.executor_io import (
    DecodeInput,
    DecodeOutput,
    PrefillInput,
    PrefillOutput,
    UnifiedBatch,
    UnifiedBatchItem,
)
from ferrum_ref.interfaces.executor_status import (
    AttentionType,
    ExecutorCapabilities,
    ExecutorMemoryUsage,
    ExecutorState,
    ExecutorStatus,
    MemoryRequirements,
)

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kv_cache import KvCacheHandle
    from ferrum_ref.interfaces.tensor import TensorRef
    from ferrum_ref.types.models import ModelInfo

__all__ = [
    "AttentionType",
    "DecodeInput",
    "DecodeOutput",
    "ExecutorCapabilities",
    "ExecutorMemoryUsage",
    "ExecutorState",
    "ExecutorStatus",
    "MemoryRequirements",
    "ModelExecutor",
    "PrefillInput",
    "PrefillOutput",
    "UnifiedBatch",
    "UnifiedBatchItem",
    "UnifiedExecutor",
]

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
        """Whole forward without a cache.  Raises UnsupportedError unless overridden."""
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
