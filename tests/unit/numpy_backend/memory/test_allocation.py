"""Allocation, release, handles, alignment, reallocation, parity."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    BackendError,
    InternalError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.memory import (
    AllocationRequirements,
    MemoryAccess,
    MemoryHandle,
    MemoryHandleInfo,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryType,
    MemoryUsageHint,
)
from ferrum_ref.numpy_backend.memory import MostFreeStrategy, NumpyMemoryManager
from ferrum_ref.numpy_backend.memory.arena import Arena
from ferrum_ref.numpy_backend.memory.handles import LAST_GENERATION, HandleTable
from ferrum_ref.types.devices import Device
from ferrum_ref.types.parity_mode import ParityMode

CPU, CUDA = Device.CPU, Device.CUDA(0)


def offsets(manager: NumpyMemoryManager) -> dict[MemoryHandle, tuple[int, int]]:
    return {handle: (offset, extent) for handle, _, offset, extent in manager.layout(CPU)}


@pytest.mark.clause("ME-ALLOC-1", "ME-INFO-1", "ME-INFO-2")
def test_sizes_are_rounded_to_the_pools_alignment(small: Any) -> None:
    manager = small(1024, alignment=256)
    handle = asyncio.run(manager.allocate(100, CPU))
    usage = manager.usage(CPU)[MemoryType.General]
    figures = (usage.committed_bytes, usage.requested_bytes, usage.padding_bytes, usage.free_bytes, usage.num_blocks)
    assert figures == (1024, 100, 156, 768, 1)
    info = asyncio.run(manager.memory_info(CPU))
    assert (info.total_bytes, info.used_bytes, info.free_bytes, info.reserved_bytes) == (1024, 256, 768, 0)
    assert info.active_allocations == 1
    asyncio.run(manager.deallocate(handle))
    assert manager.memory_info_now(CPU).used_bytes == 0
    for bad in (0, -1):
        with pytest.raises(InvalidParameterError, match="size"):
            manager.allocate_now(bad, CPU)


@pytest.mark.clause("ME-ALLOC-2")
def test_new_allocations_read_as_zeros(small: Any) -> None:
    manager = small(64)
    first = manager.allocate_now(64, CPU)
    manager.fill(first, 255)
    manager.deallocate_now(first)
    assert manager.read(manager.allocate_now(40, CPU)) == bytes(40)


@pytest.mark.clause("ME-ALLOC-3")
def test_every_byte_has_one_owner(small: Any) -> None:
    manager = small(256)
    handles = [manager.allocate_now(size, CPU) for size in (16, 1, 33, 16)]
    for number, handle in enumerate(handles, 1):
        manager.fill(handle, number)
    assert [set(manager.read(handle)) for handle in handles] == [{1}, {2}, {3}, {4}]


@pytest.mark.clause("ME-ALLOC-4")
def test_no_room_changes_nothing(small: Any) -> None:
    manager = small(64)
    handle = manager.allocate_now(33, CPU)
    manager.write(handle, b"x" * 33)
    before = manager.memory_info_now(CPU), manager.layout(CPU)
    for size in (17, 10**15, 2**64 - 1):
        with pytest.raises(ResourceExhaustedError, match="16 of 64 bytes free"):
            manager.allocate_now(size, CPU)
    assert (manager.memory_info_now(CPU), manager.layout(CPU)) == before
    assert manager.read(handle) == b"x" * 33
    manager.allocate_now(16, CPU)


@pytest.mark.clause("ME-ALLOC-5")
@pytest.mark.parametrize("alignment", [1, 64, 1024, 4096, 2 << 20])
def test_alignment_of_offset_and_address(alignment: int) -> None:
    manager = NumpyMemoryManager(capacity_bytes=8 << 20)
    manager.allocate_now(1, CPU)
    handle = asyncio.run(manager.allocate_aligned(10, alignment, CPU))
    view = asyncio.run(manager.map_memory(handle, MemoryAccess.ReadOnly))
    address = np.frombuffer(view, np.uint8).ctypes.data
    info = manager.handle_info(handle)
    assert info is not None
    assert info.alignment == max(256, alignment)
    assert offsets(manager)[handle][0] % info.alignment == 0
    assert address % info.alignment == 0


@pytest.mark.clause("ME-ALLOC-5")
def test_arenas_start_on_2_mib() -> None:
    arenas = [Arena(5000 * number) for number in range(1, 20)]
    assert {arena.view(0, 1).ctypes.data % (2 << 20) for arena in arenas} == {0}


@pytest.mark.clause("ME-ALLOC-5")
def test_skipped_bytes_stay_free(small: Any) -> None:
    manager = small(256)
    manager.allocate_now(1, CPU)
    aligned = manager.allocate_now(1, CPU, 128)
    between = manager.allocate_now(112, CPU)
    assert (offsets(manager)[aligned], offsets(manager)[between]) == ((128, 16), (16, 112))
    for bad in (0, 3, 4 << 20):
        with pytest.raises(InvalidParameterError, match="power of two"):
            manager.allocate_now(1, CPU, bad)


@pytest.mark.clause("ME-ALLOC-6")
def test_dead_handles_stay_dead(small: Any) -> None:
    manager = small(64)
    first = manager.allocate_now(16, CPU)
    manager.deallocate_now(first)
    second = manager.allocate_now(16, CPU)
    assert first.id() == 1
    assert second.id() == 1 << 32 | 1  # the same slot, the next generation
    uses: list[Any] = [
        lambda h: manager.deallocate_now(h),
        lambda h: manager.read(h),
        lambda h: manager.write(h, b"1"),
        lambda h: manager.fill(h, 1),
        lambda h: manager.reallocate_now(h, 4),
        lambda h: manager.usage_hint(h),
        lambda h: asyncio.run(manager.copy(h, second, 1, 0, 0)),
        lambda h: asyncio.run(manager.copy(second, h, 1, 0, 0)),
        lambda h: asyncio.run(manager.map_memory(h, MemoryAccess.ReadOnly)),
        lambda h: asyncio.run(manager.unmap_memory(h)),
        lambda h: asyncio.run(manager.prefetch(h, CPU)),
        lambda h: asyncio.run(manager.set_usage_hint(h, MemoryUsageHint.Random)),
    ]
    for use in uses:
        with pytest.raises(NotFoundError, match="freed"):
            use(first)
        with pytest.raises(NotFoundError, match="null"):
            use(MemoryHandle(0))
        with pytest.raises(NotFoundError, match="unknown"):
            use(MemoryHandle(77))
    assert manager.memory_info_now(CPU).active_allocations == 1
    assert manager.handle_info(first) is manager.handle_info(MemoryHandle(77)) is manager.access_stats(first) is None


@pytest.mark.clause("ME-ALLOC-6")
def test_a_slot_out_of_generations_is_retired() -> None:
    table: HandleTable[str] = HandleTable()
    table.add("a")
    table._generations[0] = LAST_GENERATION
    last = MemoryHandle(LAST_GENERATION << 32 | 1)
    assert table.remove(last, "test") == "a"
    assert table.add("b") == MemoryHandle(2)
    assert table.peek(last) is None


@pytest.mark.clause("ME-ALLOC-7", "ME-POOL-1")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_freed_neighbours_join(small: Any, order: tuple[int, ...]) -> None:
    manager = small(64)
    handles = [manager.allocate_now(16, CPU) for _ in range(4)]
    for index in order:
        manager.deallocate_now(handles[index])
    assert offsets(manager) == {}
    manager.allocate_now(64, CPU)
    manager.check_invariants()


@pytest.mark.clause("ME-ALLOC-7")
def test_a_mapped_allocation_is_not_freed(small: Any) -> None:
    manager = small(64)
    handle = manager.allocate_now(16, CPU)
    asyncio.run(manager.map_memory(handle, MemoryAccess.ReadWrite))
    with pytest.raises(InvalidParameterError, match="mapped"):
        manager.deallocate_now(handle)
    asyncio.run(manager.unmap_memory(handle))
    manager.deallocate_now(handle)


@pytest.mark.clause("ME-ALLOC-8")
def test_handle_info(small: Any, clock: Any) -> None:
    manager = small(1024)
    clock.now_s = 12.5
    handle = manager.allocate_now(100, CPU, 64, MemoryType.Tensor)
    expected = MemoryHandleInfo(handle, 100, CPU, 64, 12.5, False, MemoryType.Tensor)
    assert manager.handle_info(handle) == expected
    asyncio.run(manager.map_memory(handle, MemoryAccess.ReadOnly))
    info = manager.handle_info(handle)
    assert info is not None
    assert info.is_mapped
    assert manager.handle_info(MemoryHandle(9)) is None


def test_an_unknown_device_is_unsupported(small: Any) -> None:
    manager = small()
    for call in (manager.allocate(1, CUDA), manager.memory_info(CUDA), manager.defragment(CUDA)):
        with pytest.raises(UnsupportedError, match="cuda:0"):
            asyncio.run(call)


@pytest.mark.clause("ME-REALLOC-1")
def test_reallocation_keeps_what_is_common(small: Any) -> None:
    manager = small(256)
    handle, other = manager.allocate_now(20, CPU), manager.allocate_now(16, CPU)
    manager.write(handle, bytes(range(1, 21)))
    manager.fill(other, 9)
    manager.reallocate_now(handle, 5)
    assert (offsets(manager)[handle], manager.read(handle)) == ((0, 16), bytes(range(1, 6)))
    manager.reallocate_now(handle, 32)  # the sixteen bytes behind it are free again: in place
    assert (offsets(manager)[handle], manager.read(handle)) == ((0, 32), bytes(range(1, 6)) + bytes(27))
    manager.reallocate_now(handle, 33)  # the neighbour is in the way: it moves
    assert (offsets(manager)[handle], manager.read(handle)) == ((48, 48), bytes(range(1, 6)) + bytes(28))
    assert manager.read(other) == b"\x09" * 16
    manager.check_invariants()
    usage = manager.usage(CPU)[MemoryType.General]
    assert (usage.requested_bytes, usage.padding_bytes) == (49, 15)


@pytest.mark.clause("ME-REALLOC-1")
def test_the_last_block_grows_the_pool(small: Any) -> None:
    manager = small(256, pool={"initial_size": 64, "growth_increment": 64})
    handle = manager.allocate_now(64, CPU)
    manager.fill(handle, 3)
    manager.reallocate_now(handle, 65)
    assert (offsets(manager)[handle], manager.read(handle)) == ((0, 80), b"\3" * 64 + b"\0")
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 128


@pytest.mark.clause("ME-REALLOC-2")
def test_reallocation_without_room(small: Any) -> None:
    manager = small(96, config={"enable_auto_gc": False})
    pinned = manager.allocate_now(16, CPU, memory_type=MemoryType.Pinned)
    plain = manager.allocate_now(16, CPU)
    manager.fill(pinned, 1)
    manager.fill(plain, 2)
    with pytest.raises(ResourceExhaustedError, match="reallocate"):
        manager.reallocate_now(pinned, 17)  # 64 bytes are free, but elsewhere
    with pytest.raises(ResourceExhaustedError, match="reallocate"):
        manager.reallocate_now(plain, 81)
    assert (manager.read(pinned), manager.read(plain)) == (b"\1" * 16, b"\2" * 16)
    manager.reallocate_now(plain, 80)
    manager.check_invariants()


@pytest.mark.clause("ME-REALLOC-3")
def test_what_is_not_reallocated(small: Any) -> None:
    manager = small(256)
    handle = manager.allocate_now(16, CPU)
    with pytest.raises(InvalidParameterError, match="size"):
        manager.reallocate_now(handle, 0)
    asyncio.run(manager.map_memory(handle, MemoryAccess.ReadOnly))
    shared, _ = asyncio.run(manager.create_mapping(CPU, CPU, 16))
    for refused in (handle, shared):
        with pytest.raises(InvalidParameterError, match="reallocate"):
            manager.reallocate_now(refused, 8)


@pytest.mark.clause("ME-STRATEGY-5")
def test_allocation_by_requirements(small: Any) -> None:
    manager = small(1024, peers={CUDA: 4096})
    wish = AllocationRequirements([], MemoryType.Cache, 64, False, None)
    tight = manager.handle_info(manager.allocate_for_now(100, wish))
    most = manager.handle_info(manager.allocate_for_now(100, wish, MostFreeStrategy()))
    assert tight is not None
    assert most is not None
    assert (tight.device, tight.alignment, tight.memory_type, tight.size) == (CPU, 64, MemoryType.Cache, 100)
    assert most.device == CUDA
    with pytest.raises(ResourceExhaustedError, match="allocate_for"):
        manager.allocate_for_now(5000, wish)


@pytest.mark.clause("ME-PARITY-1")
def test_parity_with_upstreams_pool() -> None:
    config = MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(initial_size=4096)})
    for mode, expected in ((ParityMode.REFERENCE, (1024, 256)), (ParityMode.UPSTREAM, (256, 1024))):
        manager = NumpyMemoryManager(capacity_bytes=4096, config=config, parity_mode=mode)
        manager.allocate_now(1, CPU)
        handle = asyncio.run(manager.allocate_aligned(1, 1024, CPU))
        assert offsets(manager)[handle] == expected
        manager.deallocate_now(handle)
        if mode is ParityMode.UPSTREAM:
            manager.deallocate_now(handle)
            manager.configure_pool_now(CPU, MemoryPoolConfig(max_size=0, initial_size=0))
            assert manager.memory_info_now(CPU).total_bytes == 4096
            with pytest.raises(BackendError):
                manager.allocate_now(9999, CPU)
        else:
            with pytest.raises(NotFoundError):
                manager.deallocate_now(handle)
        manager.check_invariants()


@pytest.mark.clause("ME-CONFIG-2")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MemoryManagerConfig({}), "General"),
        (MemoryManagerConfig({MemoryType.Cache: MemoryPoolConfig()}), "General"),
        (MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(alignment=48)}), "power of two"),
        (MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(alignment=4 << 20)}), "power of two"),
        (MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(initial_size=9, max_size=8)}), "max_size"),
        (MemoryManagerConfig(gc_threshold=1.5), "gc_threshold"),
        (MemoryManagerConfig(gc_threshold=float("nan")), "gc_threshold"),
        (MemoryManagerConfig(max_concurrent_transfers=0), "max_concurrent_transfers"),
    ],
)
def test_bad_settings(config: MemoryManagerConfig, match: str) -> None:
    with pytest.raises(InvalidParameterError, match=match):
        NumpyMemoryManager(capacity_bytes=64, config=config)


@pytest.mark.clause("ME-CONFIG-2")
def test_bad_arguments(small: Any) -> None:
    with pytest.raises(InvalidParameterError, match="best_fit"):
        small(placement="perfect_fit")
    with pytest.raises(InvalidParameterError, match="capacity"):
        NumpyMemoryManager(capacity_bytes=-1)


@pytest.mark.clause("ME-DEBUG-1")
def test_debug_finds_a_store_into_free_bytes(small: Any) -> None:
    manager = small(256, config={"enable_debug": True})
    low, high = manager.allocate_now(30, CPU), manager.allocate_now(30, CPU)
    stale = manager._state.devices[CPU].pools[MemoryType.General].view(4, 8)  # a stray pointer
    manager.deallocate_now(low)
    manager.check_invariants()
    stale[0] = 1
    with pytest.raises(InternalError, match="were written"):
        manager.check_invariants()
    with pytest.raises(InternalError, match="were written"):
        manager.deallocate_now(high)


@pytest.mark.clause("ME-DEBUG-1")
@pytest.mark.parametrize("spoil", ["lent_bytes", "requested_bytes", "committed_bytes", "offset"])
def test_invariants_are_checked(small: Any, spoil: str) -> None:
    manager = small(256)
    manager.allocate_now(30, CPU)
    pool = manager._state.devices[CPU].pools[MemoryType.General]
    if spoil == "offset":
        next(iter(pool.blocks.values())).offset = 64
    else:
        setattr(pool, spoil, getattr(pool, spoil) - 16)
    with pytest.raises(InternalError, match="General"):
        manager.check_invariants()
