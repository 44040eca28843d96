"""`ModelExecutor` over a decoder and paged K/V: what it caches lies in the blocks of the handle it was given.

Clauses: MX-PREFILL-1..5, MX-DECODE-1..3, MX-UNIFIED-1..4, MX-STATUS-2..3 (specs/model_executor.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import NotFoundError, UnsupportedError
from ferrum_ref.executor.counters import ExecutorCounters
from ferrum_ref.executor.inputs import decode_id, first_position, prompt_ids
from ferrum_ref.executor.unified import bind, run_unified
from ferrum_ref.interfaces.forward import ForwardBatch, RaggedDecoder
from ferrum_ref.interfaces.kv_cache import AllocationRequest, CacheManagerStats, KvCacheHandle
from ferrum_ref.interfaces.kv_storage import PagedKv
from ferrum_ref.interfaces.model_executor import (
    DecodeInput,
    DecodeOutput,
    ExecutorCapabilities,
    ExecutorStatus,
    ModelExecutor,
    PrefillInput,
    PrefillOutput,
    UnifiedBatch,
)
from ferrum_ref.interfaces.tensor import TensorFactory
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.models import ModelInfo
from ferrum_ref.types.sampling import Priority

Logits = npt.NDArray[np.float32]


class CacheLender(Protocol):
    """What is needed of a KV-cache manager: its synchronous core."""

    def allocate_now(self, request: AllocationRequest) -> KvCacheHandle:
        """See `KvCacheManager.allocate`."""

    def extend_now(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """See `KvCacheManager.extend`."""

    def deallocate_now(self, request_id: RequestId) -> None:
        """See `KvCacheManager.deallocate`."""

    def stats(self) -> CacheManagerStats:
        """See `KvCacheManager.stats`."""


class PagedModelExecutor(ModelExecutor):
    """Prefill, decode and mixed batches over one paged storage.  [D-83: the block table is the cache]

    `execute_unified` trusts `pos_offset` and never grows a handle: the step loop has done so. `prefill` and `decode`
    remember how many tokens they wrote to each handle and extend it through the lender.
    """

    def __init__(
        self,
        decoder: RaggedDecoder,
        storage: PagedKv,
        factory: TensorFactory,
        info: ModelInfo,
        capabilities: ExecutorCapabilities,
        *,
        lender: CacheLender | None = None,
        head_dim: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lender` is needed by `prefill` and `decode` only; `head_dim` by a prefill without a handle."""
        self._decoder = decoder
        self._storage = storage
        self._factory = factory
        self._info = info
        self._capabilities = capabilities
        self._lender = lender
        self._head_dim = head_dim
        self._num_written: dict[str, int] = {}
        self._allocated: dict[str, RequestId] = {}
        self.counters = ExecutorCounters(clock, storage.size_bytes(), self._used_bytes)

    def info(self) -> ModelInfo:
        return self._info

    def capabilities(self) -> ExecutorCapabilities:
        return self._capabilities

    def status(self) -> ExecutorStatus:
        """Counters; used bytes are those of the blocks lent out (all of them without a lender).  [MX-STATUS-2]"""
        return self.counters.status()

    async def shutdown(self) -> None:
        """Later work raises BackendError."""
        self.counters.shut_down()

    # Mixed batches.
    def supports_native_unified_decode(self) -> bool:
        return True

    async def unified_decode(self, batch: UnifiedBatch) -> list[Logits | None]:
        return self.execute_unified(batch)

    def execute_unified(self, batch: UnifiedBatch) -> list[Logits | None]:
        """One mixed forward: the synchronous core an engine's step runs.  [MX-UNIFIED-1..4]"""
        num_prefill = sum(len(item.q_tokens) > 1 for item in batch.items)
        with self.counters.timed(num_prefill, len(batch.items) - num_prefill):
            return run_unified(self._decoder, self._storage, batch)

    # One sequence at a time.
    async def prefill(self, input: PrefillInput) -> PrefillOutput:
        """A prompt or its next chunk: logits `[1, seq, V]`, or `[1, 1, V]` for last_only.  [MX-PREFILL-1..5]

        Padding on the right is not run; its logits read 0. Without a handle one is allocated, and `release_cache`
        frees it. Mutates storage and handle.  Raises UnsupportedError (several sequences, no lender), ModelError
        (empty prompt, mask, positions), ResourceExhaustedError (context or blocks), all before anything is written.
        """
        ids = prompt_ids(input)
        num_padding = input.sequence_length() - len(ids)
        with self.counters.timed(1, 0):
            handle = input.kv_cache
            start = self._start("prefill", input, handle, len(ids))
            batch = ForwardBatch.build([ids], [start])
            batch = batch if input.last_only else batch.with_all_logits()
            self._decoder.check(batch)
            if handle is None:
                handle, rows = self._run_in_new_cache(batch)
            else:
                rows = self._run(batch, [handle], [start])
            logits = rows if input.last_only else np.concatenate([rows, np.zeros((num_padding, rows.shape[1]), "f4")])
            return PrefillOutput(
                self._factory.from_numpy(logits[None]), handle, last_logits=self._factory.from_numpy(rows[-1:])
            )

    async def decode(self, input: DecodeInput) -> DecodeOutput:
        """One token: logits `[1, V]`.  [MX-DECODE-1..3; D-43]"""
        return (await self.batch_decode([input]))[0]

    async def batch_decode(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        """One token of each sequence in one forward, in order.  [MX-DECODE-1..3]

        Mutates storage and handles.  Raises before anything is written, except that handles already extended keep
        their room: NotFoundError (a freed handle), ModelError (positions, several tokens), ResourceExhaustedError.
        """
        if not inputs:
            return []
        ids = [decode_id(input) for input in inputs]
        handles = [input.kv_cache for input in inputs]
        if len({handle.cache_id() for handle in handles}) != len(handles):
            return [await self.decode(input) for input in inputs]
        with self.counters.timed(0, len(inputs)):
            starts = [self._start("decode", input, input.kv_cache, 1) for input in inputs]
            rows = self._run(ForwardBatch.build([[i] for i in ids], starts), handles, starts)
            logits = [self._factory.from_numpy(row[None]) for row in rows]
            return [DecodeOutput(row, handle) for row, handle in zip(logits, handles, strict=True)]

    def release_cache(self, cache_id: str) -> None:
        """Forget the cache; free it if `prefill` allocated it. An unknown id is no error.  [MX-PREFILL-5]"""
        self._num_written.pop(cache_id, None)
        request_id = self._allocated.pop(cache_id, None)
        if request_id is not None:
            self._require_lender("release_cache").deallocate_now(request_id)

    def _run(self, batch: ForwardBatch, handles: Sequence[KvCacheHandle], starts: Sequence[int]) -> Logits:
        self._decoder.check(batch)
        for handle, start, num_new in zip(handles, starts, batch.lengths, strict=True):
            if start + num_new > handle.num_tokens():
                self._require_lender("prefill or decode").extend_now(handle, start + num_new - handle.num_tokens())
        kv = bind(self._storage, handles, starts, batch.lengths)
        rows = np.asarray(self._decoder.forward(batch, kv).to_numpy(), dtype=np.float32)
        for handle, start, num_new in zip(handles, starts, batch.lengths, strict=True):
            self._num_written[handle.cache_id()] = start + num_new
        return rows

    def _run_in_new_cache(self, batch: ForwardBatch) -> tuple[KvCacheHandle, Logits]:
        handle = self._allocate(batch.num_tokens)
        try:
            return handle, self._run(batch, [handle], [0])
        except BaseException:
            self.release_cache(handle.cache_id())
            raise

    def _start(
        self, operation: str, input: PrefillInput | DecodeInput, handle: KvCacheHandle | None, num_new: int
    ) -> int:
        """Position of the first new token.

        A handle this executor wrote to goes on where it stopped; another is empty to `prefill` and full to `decode`,
        and explicit positions may say that it is full to `prefill` too (a fork).
        """
        if handle is None:
            return first_position(operation, input.position_ids, num_new, 0)
        if not handle.is_valid():
            raise NotFoundError(f"{operation}: cache {handle.cache_id()} was freed; prefill a new one")
        accounted = handle.num_tokens()
        cached = self._num_written.get(handle.cache_id())
        if cached is None:
            positions = input.position_ids
            is_full = operation == "decode" or (
                positions is not None and positions.numel() > 0 and positions.to_vec_u32()[0] == accounted
            )
            cached = accounted if is_full else 0
        return first_position(operation, input.position_ids, num_new, cached)

    def _allocate(self, num_tokens: int) -> KvCacheHandle:
        lender = self._require_lender("prefill")
        request_id = RequestId.new()
        request = AllocationRequest(
            request_id=request_id,
            initial_tokens=num_tokens,
            max_sequence_length=self._decoder.max_tokens,
            num_layers=self._info.num_layers,
            num_heads=self._info.num_kv_heads,
            head_dim=self._head_dim,
            device=self._info.device,
            dtype=self._info.dtype,
            priority=Priority.Normal,
        )
        handle = lender.allocate_now(request)
        self._allocated[handle.cache_id()] = request_id
        return handle

    def _used_bytes(self) -> int:
        return self._storage.size_bytes() if self._lender is None else self._lender.stats().used_memory_bytes

    def _require_lender(self, operation: str) -> CacheLender:
        if self._lender is None:
            raise UnsupportedError(
                f"{operation}: this executor has no KV-cache manager; give it one, or use unified_decode"
            )
        return self._lender
