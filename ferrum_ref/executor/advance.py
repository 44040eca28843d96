"""One forward that appends tokens to several caches: check, allocate, grow, run; undone as a whole if any of it fails.

Clauses: MX-PREFILL-1, MX-PREFILL-4, MX-HANDLE-1..4, MX-OUTPUT-4..5 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.executor.cacheless import attention_of
from ferrum_ref.executor.caches import CacheLedger
from ferrum_ref.executor.observation import HiddenStates, ReadableKv, WeightRecorder
from ferrum_ref.executor.unified import bind
from ferrum_ref.interfaces.forward import ForwardBatch, RaggedDecoder
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.kv_storage import KvBatch, PagedKv
from ferrum_ref.interfaces.tensor import TensorFactory

Array = npt.NDArray[Any]
Logits = npt.NDArray[np.float32]
Wanted = Literal["all", "last", "none"]


@dataclass(frozen=True, slots=True)
class Append:
    """Tokens for one cache (None: a new one), and the logits wanted of them."""

    handle: KvCacheHandle | None
    tokens: Sequence[int]
    start: int
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Advanced:
    """Per append: its handle and logits `[n, V]`. Per layer and append: hidden states `[T, E]`, weights `[H, T, S]`."""

    handles: list[KvCacheHandle]
    logits: list[Logits]
    hidden: list[list[Array]] | None
    weights: list[list[Array]] | None


class Forwarder:
    """Runs appends over one decoder, storage and ledger."""

    def __init__(
        self, decoder: RaggedDecoder, storage: PagedKv, factory: TensorFactory, ledger: CacheLedger, num_layers: int
    ) -> None:
        self._decoder = decoder
        self._storage = storage
        self._factory = factory
        self._ledger = ledger
        self._num_layers = num_layers

    def advance(
        self, operation: str, appends: Sequence[Append], *, wants_hidden: bool = False, wants_weights: bool = False
    ) -> Advanced:
        """All appends in one forward. Mutates storage, handles and ledger; if it raises, none of them.  [MX-HANDLE-4]

        Raises what `Decoder.check`, the lender and the forward raise.
        """
        batch = _forward_batch(appends, every_row=wants_hidden)
        self._decoder.check(batch)
        for item in appends:
            if item.handle is not None:
                self._ledger.require_own_blocks(operation, item.handle, item.start)
        handles: list[KvCacheHandle] = []
        ends = [item.start + len(item.tokens) for item in appends]
        fresh: list[str] = []
        try:
            for item, end in zip(appends, ends, strict=True):
                handle = item.handle or self._ledger.allocate(operation, end)
                handles.append(handle)
                if item.handle is None:
                    fresh.append(handle.cache_id())
            undo = self._ledger.grow(operation, handles, ends)
            try:
                result = self._forward(operation, batch, appends, handles, wants_hidden, wants_weights)
            except BaseException:
                undo()
                raise
        except BaseException:
            for cache_id in fresh:
                self._ledger.release(cache_id)
            raise
        for handle, end in zip(handles, ends, strict=True):
            self._ledger.wrote(handle, end)
        return result

    def _forward(
        self,
        operation: str,
        batch: ForwardBatch,
        appends: Sequence[Append],
        handles: list[KvCacheHandle],
        wants_hidden: bool,
        wants_weights: bool,
    ) -> Advanced:
        starts = [item.start for item in appends]
        kv = bind(self._storage, handles, starts, batch.lengths, operation)
        hidden = HiddenStates(self._num_layers) if wants_hidden else None
        recorder = self._recorder(operation, kv, handles, starts, batch.lengths) if wants_weights else None
        rows = self._decoder.forward(batch, recorder or kv, hidden)
        logits = _split_rows(np.asarray(rows.to_numpy(), dtype=np.float32), appends, every_row=wants_hidden)
        edges = np.cumsum(batch.lengths)[:-1]
        states = None if hidden is None else [list(np.split(state, edges)) for state in hidden.states()]
        return Advanced(handles, logits, states, recorder.weights if recorder is not None else None)

    def _recorder(
        self,
        operation: str,
        kv: KvBatch,
        handles: Sequence[KvCacheHandle],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> WeightRecorder:
        storage = self._storage
        if not isinstance(storage, ReadableKv):
            raise UnsupportedError(f"{operation}: attention weights need a storage that can be read")
        attention, _ = attention_of(self._decoder, f"{operation}: attention weights")
        totals = [start + new for start, new in zip(starts, lengths, strict=True)]
        tables = [list(handle.block_table().physical_blocks) for handle in handles]
        return WeightRecorder(
            kv, attention, self._factory, lambda layer, i: storage.read(layer, tables[i], totals[i])[0], lengths, totals
        )


def _forward_batch(appends: Sequence[Append], *, every_row: bool) -> ForwardBatch:
    """The ragged batch of the appends; `every_row` asks for all logits, whatever they want. Pure."""
    batch = ForwardBatch.build([item.tokens for item in appends], [item.start for item in appends])
    if every_row:
        return batch.with_all_logits()
    rows: list[npt.NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    end = 0
    for item in appends:
        first, end = end, end + len(item.tokens)
        if item.wanted != "none":
            rows.append(np.arange(first if item.wanted == "all" else end - 1, end, dtype=np.int64))
    return ForwardBatch(batch.token_ids, batch.positions, batch.lengths, np.concatenate(rows))


def _split_rows(logits: Logits, appends: Sequence[Append], *, every_row: bool) -> list[Logits]:
    """Each append's rows: all, the last, or none. Pure."""
    parts, start = [], 0
    for item in appends:
        num = {"all": len(item.tokens), "last": 1, "none": 0}[item.wanted]
        given = len(item.tokens) if every_row else num
        parts.append(logits[start + given - num : start + given])
        start += given
    return parts
