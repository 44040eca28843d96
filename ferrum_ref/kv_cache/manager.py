"""Paged KV-cache manager: the contract's asynchronous methods over a synchronous core.

Clauses: KV-MANAGER-1..8, KV-COW-1..3, KV-PRESSURE-1..2 (specs/kv_cache.md).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import NoReturn

from ferrum_ref.errors import (
    AlreadyExistsError,
    InvalidParameterError,
    ResourceExhaustedError,
    SchedulerError,
)
from ferrum_ref.interfaces.kv_cache import (
    AllocationRequest,
    BlockTable,
    CacheGcStats,
    CacheManagerStats,
    KvCacheHandle,
    KvCacheManager,
    KvStorage,
    MemoryPressure,
    MemoryPressureThresholds,
)
from ferrum_ref.kv_cache.block_pool import BlockPool
from ferrum_ref.kv_cache.decode_stretch import DecodeStretchCore
from ferrum_ref.kv_cache.handle import KvGeometry, PagedKvCacheHandle
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.record import check_unsigned


class PagedKvCacheManager(DecodeStretchCore, KvCacheManager):
    """Lends blocks of one pool to sequences; with `storage`, copies and reads their K/V too.  [KV-MANAGER-1..8]

    The contract's methods guard the state with a lock and may be called from any thread, but not while a step of a step
    loop is in flight (SchedulerError), and not on caches that a step loop owns.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        enable_prefix_caching: bool = True,
        storage: KvStorage | None = None,
        geometry: KvGeometry | None = None,
        dtype: DataType = DataType.FP32,
        thresholds: MemoryPressureThresholds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`geometry` defaults to the storage's (elements of `dtype`), else to none: bytes then read 0.

        `clock` gives `last_access` and `gc_time_ms` and nothing else.  Raises InvalidParameterError unless num_blocks
        and block_size are >= 1.
        """
        super().__init__(
            BlockPool(num_blocks, block_size), enable_prefix_caching, storage, thresholds or MemoryPressureThresholds()
        )
        if geometry is not None:
            self.geometry = geometry
        elif storage is not None:
            self.geometry = KvGeometry.of_storage(storage, dtype)
        self._clock = clock

    # The contract, asynchronous.
    async def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        return self.allocate_now(request)

    async def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        self.extend_now(handle, additional_tokens)

    async def deallocate(self, request_id: RequestId) -> None:
        self.deallocate_now(request_id)

    async def gc(self) -> CacheGcStats:
        return self.gc_now()

    # The same, synchronous.
    def allocate_now(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """See `KvCacheManager.allocate`; sequence_length becomes `initial_tokens`.  [KV-MANAGER-1..2; D-08]"""
        with self._lock:
            self._require_between_steps("allocate")
            self._check_geometry(request)
            if request.request_id in self._handles:
                raise AlreadyExistsError(f"allocate: request {request.request_id} has a cache; deallocate it first")
            table = BlockTable.new(self.block_size)
            needed = BlockTable.blocks_needed_for_length(request.initial_tokens, self.block_size)
            taken = self.pool.take(needed)
            if taken is None:
                self._fail("allocate", needed)
            table.add_blocks(taken)
            table.sequence_length = request.initial_tokens
            handle = self.new_handle(request.request_id, table)
            handle.last_access_s = self._clock()
            self._handles[request.request_id] = handle
            self.report_pressure()
            return handle

    def extend_now(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """See `KvCacheManager.extend`: blocks and sequence_length grow together.  [KV-MANAGER-3; D-83]"""
        check_unsigned(additional_tokens, 2**64, "extend", "additional_tokens")
        with self._lock:
            paged = self._own(handle, "extend")
            length = paged.table.sequence_length + additional_tokens
            if not self.reserve(paged, length):
                self._fail("extend", -(-length // self.block_size) - paged.table.num_blocks())
            paged.table.sequence_length = length
            paged.last_access_s = self._clock()
            self.report_pressure()

    def deallocate_now(self, request_id: RequestId) -> None:
        """See `KvCacheManager.deallocate`.  [KV-MANAGER-4]"""
        with self._lock:
            handle = self._handles.get(request_id)
            if handle is not None:
                self.free_handle(handle)

    def gc_now(self) -> CacheGcStats:
        """Free forks whose last reference is gone.  [KV-MANAGER-7; D-57]"""
        with self._lock:
            self._require_between_steps("gc")
            began, free_before = self._clock(), self.pool.num_free
            dead = [cache_id for cache_id, (reference, _) in self._forks.items() if reference() is None]
            for cache_id in dead:
                _, table = self._forks.pop(cache_id)
                self.pool.give_back(reversed(table.physical_blocks))
            freed = (self.pool.num_free - free_before) * self.bytes_per_block
            return CacheGcStats(freed, len(dead), max(0, int((self._clock() - began) * 1000)))

    def can_allocate(self, request: AllocationRequest) -> bool:
        with self._lock:
            needed = BlockTable.blocks_needed_for_length(request.initial_tokens, self.block_size)
            return request.request_id not in self._handles and needed <= self.pool.num_free

    def stats(self) -> CacheManagerStats:
        with self._lock:
            per_block = self.bytes_per_block
            return CacheManagerStats(
                total_memory_bytes=self.num_blocks * per_block,
                used_memory_bytes=(self.num_blocks - self.pool.num_free) * per_block,
                active_caches=len(self._handles) + len(self._forks),
                total_blocks=self.num_blocks,
                free_blocks=self.pool.num_free,
                cache_hit_rate=self._num_prefix_hits / self._num_prefix_lookups if self._num_prefix_lookups else 0.0,
                eviction_count=self.pool.index.num_evictions,
                allocation_count=self._num_allocations,
                allocation_failures=self._num_failures,
            )

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        with self._lock:
            self._callback = callback
            self._reported = self.pressure()

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        return self._handles.get(request_id)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        with self._lock:
            forks = (reference() for reference, _ in self._forks.values())
            live = [*self._handles.values(), *(fork for fork in forks if fork is not None)]
            return [(handle.request_id, handle) for handle in sorted(live, key=lambda handle: handle.serial)]

    # Forks.
    def fork_handle(self, source: PagedKvCacheHandle) -> PagedKvCacheHandle:
        """A second handle on the blocks that hold tokens; spare blocks stay with the source.  [KV-COW-1..2; D-06]

        The fork has the source's request id and its own cache id. Mutates reference counts.
        """
        with self._lock:
            self._require_between_steps("clone_handle")
            source.require_valid("clone_handle")
            length, size = source.table.sequence_length, self.block_size
            blocks = source.table.physical_blocks[: -(-length // size)]
            for block in blocks:
                self.pool.share(block)
            if length % size:
                source.writable_tokens = length
            fork = self.new_handle(source.request_id, BlockTable(blocks, length, size))
            fork.writable_tokens = length
            fork.last_access_s = self._clock()
            self._forks[fork.cache_id()] = (weakref.ref(fork), fork.table)
            return fork

    def find_cache(self, cache_id: str) -> PagedKvCacheHandle | None:
        """The live handle with this cache id, or None. Pure.  [KV-COW-3]"""
        with self._lock:
            if cache_id in self._forks:
                return self._forks[cache_id][0]()
            return next((handle for handle in self._handles.values() if handle.cache_id() == cache_id), None)

    def free_handle(self, handle: KvCacheHandle) -> None:
        """Free one handle, fork or not; blocks that others share stay.  [KV-COW-3]

        Raises NotFoundError: freed already; SchedulerError: owned by a step loop.
        """
        with self._lock:
            paged = self._own(handle, "free_handle")
            self.pool.give_back(reversed(paged.table.physical_blocks))
            paged.table.physical_blocks.clear()
            paged.table.sequence_length = 0
            paged.valid = False
            if self._forks.pop(paged.cache_id(), None) is None:
                del self._handles[paged.request_id]
            self.report_pressure()

    def _own(self, handle: KvCacheHandle, operation: str) -> PagedKvCacheHandle:
        self._require_between_steps(operation)
        if not isinstance(handle, PagedKvCacheHandle) or handle.manager is not self:
            raise InvalidParameterError(f"{operation}: expected a handle of this manager, got {type(handle).__name__}")
        handle.require_valid(operation)
        if handle.owner is not None:
            raise SchedulerError(
                f"{operation}: cache {handle.cache_id()} is a step loop's; the loop grows it, cancel() there frees it"
            )
        return handle

    def _check_geometry(self, request: AllocationRequest) -> None:
        expected = (self.geometry.num_layers, self.geometry.num_heads, self.geometry.head_dim)
        got = (request.num_layers, request.num_heads, request.head_dim)
        if any(expected) and got != expected:
            raise InvalidParameterError(
                f"allocate: (num_layers, num_heads, head_dim) must be {expected}, got {got}; heads are K/V heads"
            )

    def _require_between_steps(self, operation: str) -> None:
        if self.pool.journal is not None:
            raise SchedulerError(f"{operation}: a step is in flight; call it between commit and plan")

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block's keys and values in all layers; 0 without a geometry."""
        return self.block_size * self.geometry.bytes_per_token()

    def _fail(self, operation: str, needed: int) -> NoReturn:
        self._num_failures += 1
        raise ResourceExhaustedError(
            f"{operation}: {needed} blocks needed, {self.pool.num_free} of {self.num_blocks} free; free a cache first"
        )
