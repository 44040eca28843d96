"""The synchronous core that scheduler and step loop drive: prefix hits, growth, release, and exact undo of a step.

Clauses: KV-STEP-1..8 (specs/kv_cache.md).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from ferrum_ref.errors import InternalError, SchedulerError
from ferrum_ref.interfaces.kv_cache import BlockTable, KvStorage, MemoryPressure, MemoryPressureThresholds
from ferrum_ref.interfaces.kv_cache import pressure_from_fraction as level_of
from ferrum_ref.interfaces.step import Schedule, SequenceState
from ferrum_ref.kv_cache.block_pool import BlockPool
from ferrum_ref.kv_cache.handle import KvGeometry, PagedKvCacheHandle
from ferrum_ref.kv_cache.prefix_cache import extend_digests
from ferrum_ref.types.ids import RequestId

if TYPE_CHECKING:
    from ferrum_ref.kv_cache.manager import PagedKvCacheManager


class StepCacheCore:
    """State of a paged manager and the operations of one step. `PagedKvCacheManager` adds the contract."""

    def __init__(
        self, pool: BlockPool, caches_prefixes: bool, storage: KvStorage | None, thresholds: MemoryPressureThresholds
    ) -> None:
        self.pool = pool
        self._block_size = pool.block_size()
        self.storage = storage
        self.geometry = KvGeometry()
        self.last_step_s = 0.0
        self._lock = threading.RLock()
        self._caches_prefixes = caches_prefixes
        self._handles: dict[RequestId, PagedKvCacheHandle] = {}
        self._thresholds = thresholds
        self._callback: Callable[[MemoryPressure], None] | None = None
        self._reported = MemoryPressure.Low
        self._driven = False
        self._serial = 0  # handles ever made
        self._num_allocations = 0
        self._num_prefix_lookups = 0  # full blocks asked for at admission
        self._num_prefix_hits = 0
        self._num_failures = 0
        self._counters_before = (0, 0, 0, 0)
        self._forks: dict[str, tuple[weakref.ref[PagedKvCacheHandle], BlockTable]] = {}

    @property
    def lock(self) -> AbstractContextManager[Any]:
        return self._lock

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self.pool.total_block_count()

    @property
    def num_free_blocks(self) -> int:
        """Blocks without a reference, findable ones included."""
        return self.pool.num_free

    @property
    def caches_prefixes(self) -> bool:
        return self._caches_prefixes

    def attach(self) -> None:
        """Raises SchedulerError when a step loop drives this manager already."""
        if self._driven:
            raise SchedulerError("PagedKvCacheManager.attach: another step loop drives this manager; make a new one")
        self._driven = True

    # A step.
    def begin_step(self, now_s: float) -> None:
        """From here every change is undoable. The pressure callback hears of the last step's level first."""
        self.report_pressure()
        self.pool.journal = []
        self.last_step_s = now_s
        self._counters_before = self._counters()

    def end_step(self) -> None:
        """Make the step's changes final."""
        journal, self.pool.journal = self.pool.journal or [], None
        for function, arguments in journal:
            if function == self._undo_release:
                arguments[1].table.physical_blocks.clear()

    def undo_step(self) -> None:
        """Undo everything since `begin_step`, exactly.  [KV-STEP-6]"""
        self.pool.undo_all()
        self._serial, self._num_allocations, self._num_prefix_lookups, self._num_prefix_hits = self._counters_before

    def planned_blocks(self, schedule: Schedule) -> set[int]:
        """Blocks that the step's new tokens lie in. Pure."""
        size = self.block_size
        written: set[int] = set()
        for sequence, computed, new in zip(schedule.members, schedule.computed, schedule.scheduled, strict=True):
            blocks = self._handle_of(sequence).table.physical_blocks
            written.update(blocks[computed // size : -(-(computed + new) // size)])
        return written

    def overwritten(self, sequence: SequenceState, blocks: set[int]) -> bool:
        """Does a computed token of the sequence lie in one of `blocks`. Pure."""
        num_used = -(-sequence.num_computed_tokens // self.block_size)
        return not blocks.isdisjoint(self._handle_of(sequence).table.physical_blocks[:num_used])

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """Drop the digests of these blocks. Mutates the prefix index."""
        self.pool.index.evict(sorted(blocks))

    def match_prefix(self, sequence: SequenceState) -> Sequence[int]:
        """Full blocks that hold the head of the known tokens, at least one token being left over.  [KV-STEP-1; D-60]

        Pure but for the memo of digests in the sequence.
        """
        index = self.pool.index
        if not self._caches_prefixes or not index:
            return ()
        size = self.block_size
        digests = sequence.block_digests
        hits: list[int] = []
        for position in range((sequence.num_known_tokens - 1) // size):
            if position == len(digests):
                extend_digests(digests, sequence.tokens, position + 1, size)
            block = index.find(digests[position])
            if block is None:
                break
            hits.append(block)
        return hits

    def admit(self, sequence: SequenceState, hits: Sequence[int], num_tokens: int) -> bool:
        """A handle on `hits` plus new blocks for `num_tokens` in all; False, with no change, if short.  [KV-STEP-2]"""
        pool, size = self.pool, self.block_size
        num_new = -(-num_tokens // size) - len(hits)
        if num_new + sum(not pool.ref_counts[block] for block in hits) > pool.num_free:
            return False
        for block in hits:
            pool.share(block)
        taken = pool.take(num_new)
        if taken is None:
            raise InternalError(f"admit: {num_new} blocks were counted free but not found")
        handle = self.new_handle(sequence.request_id, BlockTable([*hits, *taken], len(hits) * size, size))
        handle.num_registered_blocks = len(hits)
        handle.owner = sequence
        self._num_prefix_hits += len(hits)
        if self._caches_prefixes:
            self._num_prefix_lookups += (sequence.num_known_tokens - 1) // size
        sequence.handle = self._handles[sequence.request_id] = handle
        if pool.journal is not None:
            pool.journal.append((self._undo_admit, (sequence, handle)))
        return True

    def grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Make the first `num_tokens` positions writable; False, with no change, if blocks are short.  [KV-STEP-3]"""
        return self.reserve(self._handle_of(sequence), num_tokens)

    def release(self, sequence: SequenceState) -> None:
        """Free the blocks, last first, so that the prompt's head survives longest.  [KV-STEP-4]"""
        handle = self._handle_of(sequence)
        self.pool.give_back(reversed(handle.table.physical_blocks))
        sequence.handle = None
        del self._handles[sequence.request_id]
        handle.valid = False
        if self.pool.journal is not None:
            self.pool.journal.append((self._undo_release, (sequence, handle)))
        else:
            handle.table.physical_blocks.clear()

    def register_blocks(self, sequence: SequenceState) -> None:
        """Make the full computed blocks findable.  [KV-STEP-5]"""
        if not self._caches_prefixes:
            return
        handle = self._handle_of(sequence)
        first, full = handle.num_registered_blocks, sequence.num_computed_tokens // self.block_size
        if full <= first:
            return
        extend_digests(sequence.block_digests, sequence.tokens, full, self.block_size)
        blocks, digests, index = handle.table.physical_blocks, sequence.block_digests, self.pool.index
        for position in range(first, full):
            index.register(blocks[position], digests[position])
        handle.num_registered_blocks = full

    # Shared with the contract's methods.
    def new_handle(self, request_id: RequestId, table: BlockTable) -> PagedKvCacheHandle:
        """A handle with the next serial number, its whole table writable."""
        self._serial += 1
        self._num_allocations += 1
        handle = PagedKvCacheHandle(cast("PagedKvCacheManager", self), request_id, self._serial, table)
        handle.writable_tokens = len(table.physical_blocks) * table.block_size
        return handle

    def reserve(self, handle: PagedKvCacheHandle, num_tokens: int) -> bool:
        """Blocks for `num_tokens`, and a private copy of a shared last block; all or nothing.  [KV-STEP-3, KV-COW-1]"""
        if num_tokens <= handle.writable_tokens:
            return True
        pool, size = self.pool, self._block_size
        blocks, length = handle.table.physical_blocks, handle.table.sequence_length
        num_missing = max(0, -(-num_tokens // size) - len(blocks))
        tail = length // size
        shared = bool(num_tokens > length and length % size and pool.ref_counts[blocks[tail]] > 1)
        taken = pool.take(num_missing + shared)
        if taken is None:
            return False
        if pool.journal is not None:
            pool.journal.append((self._undo_reserve, (handle, list(blocks), handle.writable_tokens)))
        fresh = list(taken)
        if shared:
            copy = fresh.pop()
            if self.storage is not None:
                try:
                    self.storage.copy_block(blocks[tail], copy)
                except BaseException:
                    if pool.journal is None:
                        pool.give_back(taken)
                    raise
            pool.give_back((blocks[tail],))
            blocks[tail] = copy
        blocks.extend(fresh)
        handle.writable_tokens = len(blocks) * size
        return True

    def report_pressure(self) -> None:
        """Tell the callback when the level changed since it last heard.  [KV-PRESSURE-2]"""
        if self._callback is None:
            return
        level = self.pressure()
        if level != self._reported:
            self._reported = level
            self._callback(level)

    def pressure(self) -> MemoryPressure:
        """Level of the fraction of blocks in use. Pure.  [KV-PRESSURE-1; D-38]"""
        return level_of((self.num_blocks - self.pool.num_free) / self.num_blocks, self._thresholds)

    def _handle_of(self, sequence: SequenceState) -> PagedKvCacheHandle:
        handle = sequence.handle
        if not isinstance(handle, PagedKvCacheHandle):
            raise InternalError(f"kv_cache: request {sequence.request_id} holds no cache")
        return handle

    def _counters(self) -> tuple[int, int, int, int]:
        return self._serial, self._num_allocations, self._num_prefix_lookups, self._num_prefix_hits

    def _undo_admit(self, sequence: SequenceState, handle: PagedKvCacheHandle) -> None:
        sequence.handle = None
        handle.valid = False
        handle.table.physical_blocks.clear()
        del self._handles[handle.request_id]

    def _undo_reserve(self, handle: PagedKvCacheHandle, blocks: list[int], writable_tokens: int) -> None:
        handle.table.physical_blocks[:] = blocks
        handle.writable_tokens = writable_tokens

    def _undo_release(self, sequence: SequenceState, handle: PagedKvCacheHandle) -> None:
        sequence.handle = self._handles[handle.request_id] = handle
        handle.valid = True
