"""What an engine's step asks for, over a `DecoderOnlyLLM` that keeps its own caches.  Clause: LM-LLM-15 (specs/llm.md).

The handles' blocks then hold no keys and values; they only bound how many tokens run at once.
"""

from __future__ import annotations

import threading

from ferrum_ref.errors import ModelError, NotFoundError, ResourceExhaustedError
from ferrum_ref.executor.exclusive import exclusive
from ferrum_ref.executor.unified import Logits, check_distinct
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.llm import DecoderOnlyLLM
from ferrum_ref.interfaces.model_executor import UnifiedBatch, UnifiedBatchItem


class LlmExecutor:
    """A `UnifiedExecutor`: one cache of the LLM for each handle, until the handle is freed.  [LM-LLM-15]

    The manager of the blocks must not share prefixes: what another sequence computed is not in the LLM's cache of this
    one. The LLM is used by nobody else. Calls of several threads run one by one.
    """

    def __init__(self, llm: DecoderOnlyLLM) -> None:
        """`llm` must offer `unified_forward`, `cache_length` and `truncate_kv`."""
        self.guard = threading.RLock()
        self._llm = llm
        self._handles: dict[str, KvCacheHandle] = {}

    @exclusive
    def execute_unified(self, batch: UnifiedBatch) -> list[Logits | None]:
        """One mixed forward.  [MX-UNIFIED-1, MX-UNIFIED-3..5]

        Mutates the LLM's caches: what they hold from `pos_offset` on goes first.  Raises, before any is written:
        ModelError (no tokens, a negative position, one sequence twice), NotFoundError (a freed handle, a position that
        the LLM has not reached), ResourceExhaustedError (context, the handle's blocks), InvalidParameterError (token).
        """
        self._release_freed()
        check_distinct(batch.items)
        for item in batch.items:
            self._check(item)
        ids = [item.kv_cache.cache_id() for item in batch.items]
        for cache_id, item in zip(ids, batch.items, strict=True):
            if cache_id in self._handles and item.pos_offset < self._llm.cache_length(cache_id):
                self._llm.truncate_kv(cache_id, item.pos_offset)
        results = self._llm.unified_forward(
            [
                (cache_id, item.q_tokens, item.pos_offset, item.is_final_chunk)
                for cache_id, item in zip(ids, batch.items, strict=True)
            ]
        )
        self._handles.update(zip(ids, (item.kv_cache for item in batch.items), strict=True))
        return results

    @property
    def num_caches(self) -> int:
        """Handles that have a cache of the LLM."""
        return len(self._handles)

    def _check(self, item: UnifiedBatchItem) -> None:
        handle, start = item.kv_cache, item.pos_offset
        if not handle.is_valid():
            raise NotFoundError(f"execute_unified: cache {handle.cache_id()} was freed; allocate a new one")
        if start < 0:
            raise ModelError(f"execute_unified: position {start} of {item.seq_id!r}, expected 0 or more")
        known = self._llm.cache_length(handle.cache_id()) if handle.cache_id() in self._handles else 0
        if start > known:
            raise NotFoundError(
                f"execute_unified: {item.seq_id!r} goes on at position {start}, but the model keeps {known} tokens of"
                f" {handle.cache_id()}; run it from there, and lend no prefixes"
            )
        table = handle.block_table()
        if table.num_blocks() * table.block_size < start + len(item.q_tokens):
            raise ResourceExhaustedError(
                f"execute_unified: {handle.cache_id()} has {table.num_blocks()} blocks of {table.block_size} tokens,"
                f" which cannot hold {start} cached + {len(item.q_tokens)} new tokens; extend it first"
            )

    def _release_freed(self) -> None:
        for cache_id, handle in list(self._handles.items()):
            if not handle.is_valid():
                self._llm.release(cache_id)
                del self._handles[cache_id]
