"""The contract of the paged manager: allocation, growth, clones, pressure, statistics."""

from __future__ import annotations

import asyncio
import gc

import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
    SchedulerError,
)
from ferrum_ref.interfaces.kv_cache import AllocationRequest, KvCacheManager, MemoryPressure
from ferrum_ref.kv_cache.handle import KvGeometry
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority

GEOMETRY = KvGeometry(num_layers=2, num_heads=3, head_dim=8, dtype=DataType.FP16)


def asking(tokens: int, request_id: RequestId | None = None, heads: int = 3) -> AllocationRequest:
    return AllocationRequest(
        request_id or RequestId.new(), tokens, 64, 2, heads, 8, Device.CPU, DataType.FP16, Priority.Normal
    )


def manager(num_blocks: int = 4, block_size: int = 4) -> PagedKvCacheManager:
    return PagedKvCacheManager(num_blocks, block_size, geometry=GEOMETRY, clock=lambda: 5.0)


@pytest.mark.clause("KV-MANAGER-1", "KV-MANAGER-5")
def test_allocation_is_all_or_nothing() -> None:
    cache = manager(4)
    first = cache.allocate_now(asking(4))
    assert (first.block_table().physical_blocks, first.num_tokens()) == ([0], 4)
    assert not cache.can_allocate(asking(13))
    with pytest.raises(ResourceExhaustedError, match="4 blocks needed, 3 of 4 free"):
        cache.allocate_now(asking(13))
    assert cache.stats().free_blocks == 3  # upstream: 0, leaked
    assert cache.stats().allocation_failures == 1
    assert cache.can_allocate(asking(12))
    assert cache.allocate_now(asking(12)).block_table().physical_blocks == [1, 2, 3]


@pytest.mark.clause("KV-MANAGER-2")
def test_one_cache_per_request_of_the_right_geometry() -> None:
    cache, request_id = manager(), RequestId.new()
    handle = cache.allocate_now(asking(5, request_id))
    assert not cache.can_allocate(asking(1, request_id))
    with pytest.raises(AlreadyExistsError):
        cache.allocate_now(asking(1, request_id))
    assert cache.get_handle(request_id) is handle
    assert cache.stats().free_blocks == 2
    with pytest.raises(InvalidParameterError, match="K/V heads"):
        cache.allocate_now(asking(1, heads=9))


@pytest.mark.clause("KV-MANAGER-3")
def test_extend_grows_length_and_blocks_or_nothing() -> None:
    cache = manager(3)
    handle = cache.allocate_now(asking(3))
    cache.extend_now(handle, 1)
    assert (handle.num_tokens(), handle.block_table().num_blocks()) == (4, 1)
    cache.extend_now(handle, 8)
    assert (handle.num_tokens(), handle.block_table().physical_blocks) == (12, [0, 1, 2])
    with pytest.raises(ResourceExhaustedError):
        cache.extend_now(handle, 1)
    assert (handle.num_tokens(), handle.block_table().num_blocks()) == (12, 3)
    cache.extend_now(handle, 0)
    with pytest.raises(InvalidParameterError):
        cache.extend_now(handle, -1)
    with pytest.raises(InvalidParameterError, match="handle of this manager"):
        manager().extend_now(handle, 1)


@pytest.mark.clause("KV-MANAGER-4", "KV-HANDLE-5")
def test_freed_blocks_come_back_last_first() -> None:
    cache, request_id = manager(4), RequestId.new()
    handle = cache.allocate_now(asking(12, request_id))
    cache.deallocate_now(request_id)
    cache.deallocate_now(request_id)  # unknown now: no error
    assert list(cache.pool.free_list()) == [3, 2, 1, 0]
    assert not handle.is_valid()
    assert handle.block_table().physical_blocks == []
    again = cache.allocate_now(asking(1, request_id))
    assert again.cache_id() != handle.cache_id()
    with pytest.raises(NotFoundError):
        cache.extend_now(handle, 1)
    with pytest.raises(NotFoundError):
        cache.free_handle(handle)


@pytest.mark.clause("KV-MANAGER-6", "KV-HANDLE-4", "KV-HANDLE-6")
def test_statistics_are_those_of_the_storage() -> None:
    cache = manager(4, 4)
    handle = cache.allocate_now(asking(6))
    per_block = 4 * 2 * 2 * 3 * 8 * 2
    stats = cache.stats()
    assert (stats.total_memory_bytes, stats.used_memory_bytes) == (4 * per_block, 2 * per_block)
    assert (stats.active_caches, stats.total_blocks, stats.free_blocks, stats.allocation_count) == (1, 4, 2, 1)
    assert (stats.cache_hit_rate, stats.eviction_count) == (0.0, 0)
    mine = handle.stats()
    assert (mine.memory_bytes, mine.blocks_allocated, mine.tokens_stored) == (2 * per_block, 2, 6)
    assert (mine.utilization, mine.last_access) == (6 / 8, 5.0)
    assert (handle.num_layers(), handle.num_heads(), handle.head_dim(), handle.device()) == (2, 3, 8, Device.CPU)
    assert cache.allocate_now(asking(0)).stats().utilization == 0.0


@pytest.mark.clause("KV-MANAGER-7")
def test_gc_frees_forgotten_clones_only() -> None:
    cache = manager(4, 4)
    handle = cache.allocate_now(asking(4))
    clone = cache.allocate_now(asking(4)).clone_handle()
    kept = handle.clone_handle()
    cache.extend_now(clone, 2)
    assert cache.gc_now().caches_freed == 0
    del clone
    gc.collect()
    freed = cache.gc_now()
    assert (freed.caches_freed, freed.memory_freed) == (1, 4 * 2 * 2 * 3 * 8 * 2)
    assert kept.is_valid()
    assert cache.pool.ref_counts[:2] == [2, 1]


@pytest.mark.clause("KV-MANAGER-8")
def test_nothing_changes_under_a_step() -> None:
    cache = manager()
    handle = cache.allocate_now(asking(4))
    cache.begin_step(0.0)
    for call in (
        lambda: cache.allocate_now(asking(1)),
        lambda: cache.extend_now(handle, 1),
        lambda: cache.deallocate_now(handle.request_id),
        lambda: cache.free_handle(handle),
        handle.clone_handle,
        cache.gc_now,
    ):
        with pytest.raises(SchedulerError, match="in flight"):
            call()
    cache.end_step()
    cache.attach()
    with pytest.raises(SchedulerError, match="another step loop"):
        cache.attach()


@pytest.mark.clause("KV-PRESSURE-1", "KV-PRESSURE-2")
def test_pressure_is_told_when_its_level_changes() -> None:
    cache, heard = manager(20, 1), []
    cache.set_pressure_callback(heard.append)
    assert cache.pressure() is MemoryPressure.Low  # upstream calls a fresh pool Critical
    ids = [RequestId.new() for _ in range(3)]
    cache.allocate_now(asking(11, ids[0]))  # 55 %
    cache.allocate_now(asking(1, ids[1]))  # 60 %
    handle = cache.allocate_now(asking(4, ids[2]))  # 80 %
    cache.extend_now(handle, 3)  # 95 %
    cache.deallocate_now(ids[0])
    assert heard == [MemoryPressure.Medium, MemoryPressure.High, MemoryPressure.Critical, MemoryPressure.Low]


@pytest.mark.clause("KV-COW-1", "KV-COW-2", "KV-HANDLE-3")
def test_a_clone_copies_the_shared_last_block_when_either_writes() -> None:
    cache = manager(4, 4)
    handle = cache.allocate_now(asking(6))
    clone = handle.clone_handle()
    assert clone.block_table().physical_blocks == [0, 1]
    assert clone.cache_id() != handle.cache_id()
    assert cache.pool.ref_counts == [2, 2, 0, 0]
    cache.extend_now(clone, 1)
    cache.extend_now(handle, 1)
    assert handle.block_table().physical_blocks == [0, 1]
    assert clone.block_table().physical_blocks == [0, 2]
    assert cache.pool.ref_counts == [2, 1, 1, 0]
    cache.check_invariants([])


@pytest.mark.clause("KV-COW-1", "KV-POOL-6")
def test_extending_by_nothing_does_not_open_a_shared_block() -> None:
    cache = manager(4, 4)
    handle = cache.allocate_now(asking(2))
    clone = handle.clone_handle()
    cache.extend_now(clone, 0)
    assert clone.writable_tokens == 2
    cache.check_invariants([])


@pytest.mark.clause("KV-COW-1")
def test_spare_blocks_stay_with_the_source() -> None:
    cache = manager(4, 4)
    handle = cache.allocate_now(asking(4))
    assert cache.reserve(handle, 8)
    clone = handle.clone_handle()
    assert (handle.block_table().num_blocks(), clone.block_table().num_blocks()) == (2, 1)
    cache.extend_now(clone, 1)
    cache.extend_now(handle, 1)
    assert clone.block_table().physical_blocks == [0, 2]
    assert handle.block_table().physical_blocks == [0, 1]


@pytest.mark.clause("KV-COW-3")
def test_handles_are_found_and_freed_independently() -> None:
    cache = manager(4, 4)
    handle = cache.allocate_now(asking(6))
    clone = handle.clone_handle()
    assert cache.find_cache(clone.cache_id()) is clone
    assert cache.find_cache(handle.cache_id()) is handle
    assert cache.find_cache("kv-99") is None
    assert [live for _, live in cache.list_handles()] == [handle, clone]
    cache.free_handle(handle)
    assert cache.pool.ref_counts == [1, 1, 0, 0]  # upstream frees the clone's blocks here
    assert clone.is_valid()
    cache.extend_now(clone, 1)
    assert clone.block_table().physical_blocks == [0, 1]
    cache.free_handle(clone)
    assert cache.num_free_blocks == 4
    assert cache.list_handles() == []
    with pytest.raises(NotFoundError):
        clone.clone_handle()


@pytest.mark.clause("KV-MANAGER-1", "KV-MANAGER-3", "KV-MANAGER-4", "KV-MANAGER-7")
def test_the_asynchronous_methods_are_the_same() -> None:
    async def life() -> None:
        cache: KvCacheManager = manager()
        request_id = RequestId.new()
        handle = await cache.allocate(asking(4, request_id))
        await cache.extend(handle, 4)
        assert handle.num_tokens() == 8
        assert (await cache.gc()).caches_freed == 0
        await cache.deallocate(request_id)
        assert cache.stats().free_blocks == 4
        assert cache.get_handle(request_id) is None

    asyncio.run(life())
