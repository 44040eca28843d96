"""`ModelExecutor` over a decoder and paged K/V: what it caches lies in the blocks of the handle it was given.

The contract's asynchronous methods are thin wrappers over `*_now` methods, which an engine's worker thread may call.
Clauses: MX-* (specs/model_executor.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ferrum_ref.executor.advance import Append, Forwarder, Logits, Wanted
from ferrum_ref.executor.batch_handle import cache_rows
from ferrum_ref.executor.cacheless import TransientKv, attention_of, forward_batch, run_forward
from ferrum_ref.executor.caches import CacheLedger, CacheLender
from ferrum_ref.executor.counters import ExecutorCounters
from ferrum_ref.executor.exclusive import exclusive
from ferrum_ref.executor.inputs import check_positions
from ferrum_ref.executor.requests import DecodeRequest, PrefillRequest, verify_chain
from ferrum_ref.executor.unified import run_unified
from ferrum_ref.interfaces.forward import RaggedDecoder
from ferrum_ref.interfaces.kv_cache import AllocationRequest, KvCacheHandle
from ferrum_ref.interfaces.kv_storage import PagedKv
from ferrum_ref.interfaces.model_executor import (
    DecodeInput,
    DecodeOutput,
    ExecutorCapabilities,
    ExecutorMetrics,
    ExecutorStatus,
    ModelExecutor,
    PrefillInput,
    PrefillOutput,
    UnifiedBatch,
)
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.models import ModelInfo
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.sampling import Priority

__all__ = ["CacheLender", "PagedModelExecutor"]


class PagedModelExecutor(ModelExecutor):
    """Prefill, decode and mixed batches over one paged storage.  [D-83: the block table is the cache]

    `execute_unified` trusts `pos_offset` and never grows a handle: the step loop has done so. Everything else remembers
    how many tokens it wrote to each handle and grows it through the lender. Calls of several threads run one by one.
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
        parity_mode: ParityMode = ParityMode.REFERENCE,
    ) -> None:
        """`lender` is needed by `prefill` and `decode` only; `head_dim` by a prefill without a handle.

        parity_mode UPSTREAM: prefill gives the last position's logits alone, as upstream's production does (D-48).
        """
        self.guard = threading.RLock()
        self._decoder = decoder
        self._storage = storage
        self._factory = factory
        self._info = info
        self._capabilities = capabilities
        self._parity_mode = parity_mode
        self._lender = lender
        template = AllocationRequest(
            request_id=RequestId.new(),
            initial_tokens=0,
            max_sequence_length=decoder.max_tokens,
            num_layers=info.num_layers,
            num_heads=info.num_kv_heads,
            head_dim=head_dim,
            device=info.device,
            dtype=info.dtype,
            priority=Priority.Normal,
        )
        self._ledger = CacheLedger(lender, template)
        self._forwarder = Forwarder(decoder, storage, factory, self._ledger, info.num_layers)
        self.counters = ExecutorCounters(clock, storage.size_bytes(), self._used_bytes, capabilities.max_batch_size)

    def info(self) -> ModelInfo:
        return self._info

    def capabilities(self) -> ExecutorCapabilities:
        return self._capabilities

    def status(self) -> ExecutorStatus:
        """Counters; used bytes are those of the blocks lent out (all of them without a lender).  [MX-STATUS-2]"""
        return self.counters.status()

    def metrics(self) -> ExecutorMetrics:
        """Performance since construction.  [MX-METRICS-1..3]"""
        return self.counters.metrics()

    def kv_capacity(self) -> int | None:
        """Tokens of all blocks together where they are fewer than the context.  [MX-STATUS-4]"""
        capacity = self._storage.num_blocks * self._storage.block_size
        return capacity if capacity < self._decoder.max_tokens else None

    def cache_metrics_snapshot(self) -> dict[str, Any] | None:
        """The lender's counters; None without one.  [MX-STATUS-4]"""
        return None if self._lender is None else asdict(self._lender.stats())

    async def shutdown(self) -> None:
        """Later work raises BackendError."""
        self.counters.shut_down()

    # Mixed batches.
    def supports_native_unified_decode(self) -> bool:
        return True

    async def unified_decode(self, batch: UnifiedBatch) -> list[Logits | None]:
        return self.execute_unified(batch)

    @exclusive
    def execute_unified(self, batch: UnifiedBatch) -> list[Logits | None]:
        """One mixed forward: the synchronous core an engine's step runs.  [MX-UNIFIED-1..5]"""
        num_prefill = sum(len(item.q_tokens) > 1 for item in batch.items)
        with self.counters.timed(num_prefill, len(batch.items) - num_prefill, batch.total_q_tokens()):
            return run_unified(self._decoder, self._storage, batch)

    # Without a cache.
    async def forward(self, input: TensorRef) -> TensorRef:
        return self.forward_now(input)

    @exclusive
    def forward_now(self, input: TensorRef) -> TensorRef:
        """ids `[T]`, `[B, T]` or embeddings `[B, T, E]` -> logits `[B, T, V]`, nothing stored.  [MX-FORWARD-1..2]

        Every row starts at position 0. Pure but for the counters.
        Raises ModelError (rank, no token), ShapeError (E), InvalidParameterError (token id), ResourceExhaustedError
        (context), UnsupportedError (a decoder that gives no access to its attention, or takes no embeddings).
        """
        batch, (num_rows, length), embeddings = forward_batch(input)
        attention, tensor_ops = attention_of(self._decoder, "forward")
        self._decoder.check(batch)
        with self.counters.timed(num_rows, 0, batch.num_tokens):
            kv = TransientKv(attention, tensor_ops, batch.lengths)
            logits = run_forward(self._decoder, batch, kv, embeddings)
            return logits.reshape((num_rows, length, logits.shape()[1]))

    # Prompts.
    async def prefill(self, input: PrefillInput) -> PrefillOutput:
        return self.prefill_now([input])[0]

    async def batch_prefill(self, inputs: Sequence[PrefillInput]) -> list[PrefillOutput]:
        return self.prefill_now(inputs)

    @exclusive
    def prefill_now(self, inputs: Sequence[PrefillInput]) -> list[PrefillOutput]:
        """Prompts or their next chunks in one forward, order kept.  [MX-PREFILL-1, 3..7, MX-BATCH-3, MX-OUTPUT-1..6]

        Per input: logits `[B, T, V]`, or `[B, 1, V]` for last_only. Padding is not run; it reads 0. Without a handle
        caches are allocated, and `release_cache` frees them. Mutates storage and handles; when it raises, nothing.
        Raises UnsupportedError (several rows in one handle, no lender), ModelError (contents of ids, mask, positions),
        ShapeError (theirs), NotFoundError (freed or foreign handle), ResourceExhaustedError (context or blocks).
        """
        requests = [PrefillRequest.read(input, self._parity_mode) for input in inputs]
        if _repeats(request.handles for request in requests):
            return [self.prefill_now([input])[0] for input in inputs]
        appends = [item for request in requests for item in request.appends(self._start)]
        if not appends:
            return []
        with self.counters.timed(len(appends), 0, sum(len(item.tokens) for item in appends)):
            done = self._forwarder.advance(
                "prefill",
                appends,
                wants_hidden=any(input.wants_hidden_states for input in inputs),
                wants_weights=any(input.wants_attention_weights for input in inputs),
            )
        outputs, first = [], 0
        for request in requests:
            outputs.append(request.output(done, first, self._factory))
            first += len(request.rows)
        return outputs

    # Single tokens.
    async def decode(self, input: DecodeInput) -> DecodeOutput:
        return self.decode_now([input])[0]

    async def batch_decode(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        return self.decode_now(inputs)

    @exclusive
    def decode_now(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        """One token of each sequence in one forward, in order: logits `[B, V]`.  [MX-DECODE-1, 3..4, MX-BATCH-3; D-43]

        Mutates storage and handles; when it raises, nothing. A handle that occurs twice is decoded twice, in order;
        what an error leaves undone is then the failing call and those after it. Raises as `prefill_now`.
        """
        requests = [DecodeRequest.read(input) for input in inputs]
        if _repeats(request.handles for request in requests):
            return [self.decode_now([input])[0] for input in inputs]
        appends = [item for request in requests for item in request.appends(self._start)]
        if not appends:
            return []
        with self.counters.timed(0, len(appends)):
            done = self._forwarder.advance(
                "decode",
                appends,
                wants_hidden=any(input.wants_hidden_states for input in inputs),
                wants_weights=any(input.wants_attention_weights for input in inputs),
            )
        outputs, first = [], 0
        for request in requests:
            outputs.append(request.output(done, first, self._factory))
            first += len(request.rows)
        return outputs

    # Verification and rollback.
    async def forward_verify(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        return self.verify_now(inputs)

    @exclusive
    def verify_now(self, inputs: Sequence[DecodeInput]) -> list[DecodeOutput]:
        """Successive tokens of one sequence in one forward, from its cached length on.  [MX-VERIFY-1; D-36]"""
        if not inputs:
            return []
        handle, tokens, positions = verify_chain(inputs)
        start = self._start("forward_verify", handle, positions, len(tokens))
        with self.counters.timed(0, len(tokens)):
            done = self._forwarder.advance("forward_verify", [Append(handle, tokens, start, "all")])
        return [DecodeOutput.new(self._factory.from_numpy(row[None]), handle) for row in done.logits[0]]

    @property
    def max_tokens(self) -> int:
        """Longest sequence, in tokens."""
        return self._decoder.max_tokens

    @exclusive
    def new_cache_now(self) -> KvCacheHandle:
        """An empty cache; `release_cache` frees it.  Raises UnsupportedError without a lender.  [MX-VERIFY-2]"""
        handle = self._ledger.allocate("new_cache", 0)
        self._ledger.wrote(handle, 0)
        return handle

    @exclusive
    def append_now(
        self, handles: Sequence[KvCacheHandle], tokens: Sequence[Sequence[int]], wanted: Wanted = "all"
    ) -> list[Logits]:
        """tokens[i] at the end of handles[i], all in one forward: the wanted rows of logits `[n_i, V]`. [MX-VERIFY-2]

        Mutates storage and handles; when it raises, nothing. Raises as `prefill_now`.
        """
        if not handles:
            return []
        starts = [self._start("append", handle, None, 1) for handle in handles]
        appends = [Append(*part, wanted) for part in zip(handles, tokens, starts, strict=True)]
        num_prefills = sum(len(part) > 1 for part in tokens)
        with self.counters.timed(num_prefills, len(appends) - num_prefills, sum(len(part) for part in tokens)):
            return self._forwarder.advance("append", appends).logits

    async def truncate_kv(self, kv_cache: KvCacheHandle, new_len: int) -> None:
        """Forget the tokens from `new_len` on; blocks wholly behind it go back.  [MX-TRUNCATE-2..5]

        Raises NotFoundError, InvalidParameterError (outside [0, cached]), UnsupportedError (a manager that cannot).
        """
        self.truncate_now(kv_cache, new_len)

    @exclusive
    def truncate_now(self, kv_cache: KvCacheHandle, new_len: int) -> None:
        """See `truncate_kv`."""
        (handle,) = cache_rows("truncate_kv", kv_cache, 1)
        self._ledger.truncate(handle, new_len)

    @exclusive
    def release_cache(self, cache_id: str) -> None:
        """Forget the cache (or a batch's caches); free what was allocated here.  [MX-PREFILL-5, MX-HANDLE-5]"""
        for part in cache_id.split("+"):
            self._ledger.release(part)

    def can_truncate(self) -> bool:
        """Does `truncate_kv` take tokens back. Pure."""
        return self._ledger.can_truncate()

    def _start(
        self, operation: str, handle: KvCacheHandle | None, positions: Sequence[int] | None, num_new: int
    ) -> int:
        """Position of the first new token.  [MX-PREFILL-3, MX-HANDLE-1..2]

        A cache this executor wrote to goes on where it stopped; another is empty to `prefill` and full to all else, and
        explicit positions may say that it is full to `prefill` too (a fork).
        """
        start = 0
        if handle is not None:
            self._ledger.require(operation, handle)
            written = self._ledger.num_cached(handle)
            accounted = handle.num_tokens()
            is_full = operation != "prefill" or (positions is not None and positions[0] == accounted)
            start = written if written is not None else accounted if is_full else 0
        if positions is not None:
            check_positions(operation, positions, start)
        return start

    def _used_bytes(self) -> int:
        return self._storage.size_bytes() if self._lender is None else self._lender.stats().used_memory_bytes


def _repeats(groups: Any) -> bool:
    """Does one cache occur twice."""
    ids = [handle.cache_id() for handles in groups for handle in handles]
    return len(set(ids)) != len(ids)
