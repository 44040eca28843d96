"""Whole batches in one mixed forward, with a batch size that is measured.

Clauses: MX-BATCH-3..6 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.errors import ResourceExhaustedError
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.model_executor import (
    BatchModelExecutor,
    DecodeInput,
    DecodeOutput,
    PrefillInput,
    PrefillOutput,
)

PROBE_TOKEN = 0
PROBE_STEPS = 2


class PagedBatchExecutor(PagedModelExecutor, BatchModelExecutor):
    """`PagedModelExecutor` that takes at most `capabilities().max_batch_size` sequences a call.  [MX-BATCH-3..6]"""

    async def batch_prefill(self, inputs: Sequence[PrefillInput]) -> list[PrefillOutput]:
        self._require_size("batch_prefill", sum(input.batch_size() for input in inputs))
        return self.prefill_now(inputs)

    async def batch_decode(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        self._require_size("batch_decode", sum(input.batch_size() for input in inputs))
        return self.decode_now(inputs)

    def optimal_batch_size(self) -> int:
        """The size that decoded the most tokens per second so far; the largest taken where nothing was measured."""
        limit = self._capabilities.max_batch_size
        return min(limit, self.counters.fastest_decode_batch() or limit)

    def supports_batch_size(self, batch_size: int) -> bool:
        return 1 <= batch_size <= self._capabilities.max_batch_size

    async def warmup(self) -> None:
        """Measure decoding at 1, 2, 4, ... and the largest batch, as far as free blocks reach.  [MX-BATCH-5]

        Takes and gives back caches of a few tokens; counts as operations.
        """
        sizes = {self._capabilities.max_batch_size}
        sizes |= {2**i for i in range(self._capabilities.max_batch_size.bit_length())}
        for size in sorted(size for size in sizes if self.supports_batch_size(size)):
            if not self._probe(size):
                return

    def _probe(self, batch_size: int) -> bool:
        """Decode a few tokens of `batch_size` sequences; False where blocks or context are short."""
        handles: list[KvCacheHandle] = []
        try:
            for _ in range(batch_size):
                handles.append(self.new_cache_now())
            for _ in range(PROBE_STEPS):
                self.append_now(handles, [[PROBE_TOKEN]] * batch_size)
        except ResourceExhaustedError:
            return False
        finally:
            for handle in handles:
                self.release_cache(handle.cache_id())
        return True

    def _require_size(self, operation: str, batch_size: int) -> None:
        if batch_size > self._capabilities.max_batch_size:
            raise ResourceExhaustedError(
                f"{operation}: {batch_size} sequences, but at most {self._capabilities.max_batch_size} are taken at"
                " once; send them in several calls"
            )
