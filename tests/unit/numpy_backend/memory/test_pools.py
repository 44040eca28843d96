"""Pools: free list, placement, growth, limits, reconfiguration."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InternalError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import MemoryAccess, MemoryPoolConfig, MemoryType
from ferrum_ref.numpy_backend.memory.free_list import FreeList
from ferrum_ref.numpy_backend.memory.placement import PlacementName, make_placement
from ferrum_ref.types.devices import Device

CPU = Device.CPU


def free_list(*runs: tuple[int, int]) -> FreeList:
    free = FreeList()
    for start, end in runs:
        free.add(start, end)
    return free


@pytest.mark.clause("ME-POOL-1", "ME-POOL-2")
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 12)), max_size=40))
def test_free_list_against_a_set_of_bytes(steps: Sequence[tuple[bool, int, int]]) -> None:
    free, model = FreeList(), set[int]()
    for is_add, start, length in steps:
        span = set(range(start, start + length))
        possible = not (span & model) if is_add else span <= model
        if possible:
            (free.add if is_add else free.take)(start, start + length)
            model = model | span if is_add else model - span
        else:
            with pytest.raises(InternalError, match="free list"):
                (free.add if is_add else free.take)(start, start + length)
        runs = list(free.by_address())
        assert {byte for low, high in runs for byte in range(low, high)} == model
        assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))  # joined: neighbours never touch
        assert free.total_bytes == len(model)
        assert list(free.by_size(3)) == sorted((r for r in runs if r[1] - r[0] >= 3), key=lambda r: (r[1] - r[0], r[0]))
        for byte in range(43):
            assert (free.run_at(byte) is not None) == (byte in model)


RUNS = ((0, 64), (80, 112), (128, 160), (256, 400))


@pytest.mark.clause("ME-PLACE-1", "ME-PLACE-2", "ME-PLACE-3")
@pytest.mark.parametrize(
    ("name", "size", "alignment", "offset"),
    [
        ("best_fit", 32, 16, 80),
        ("best_fit", 32, 64, 128),  # 80 is no multiple, the run at 128 is as small
        ("best_fit", 33, 16, 0),
        ("best_fit", 65, 16, 256),
        ("best_fit", 200, 16, None),
        ("first_fit", 32, 16, 0),
        ("first_fit", 65, 16, 256),
        ("worst_fit", 16, 16, 256),
        ("worst_fit", 145, 16, None),
    ],
)
def test_placement(name: PlacementName, size: int, alignment: int, offset: int | None) -> None:
    assert make_placement(name).choose(free_list(*RUNS), size, alignment) == offset


@pytest.mark.clause("ME-PLACE-3")
def test_worst_fit_takes_the_lowest_of_equals() -> None:
    assert make_placement("worst_fit").choose(free_list((0, 16), (32, 64), (96, 128)), 8, 8) == 32
    assert make_placement("worst_fit").choose(free_list((16, 48), (64, 96)), 32, 64) == 64


@pytest.mark.clause("ME-PLACE-4")
def test_next_fit_goes_on_from_where_it_was() -> None:
    policy, free = make_placement("next_fit"), free_list(*RUNS)
    offsets = []
    for _ in range(8):
        offset = policy.choose(free, 48, 16)
        if offset is not None:
            free.take(offset, offset + 48)
        offsets.append(offset)
    assert offsets == [0, 256, 304, 352, None, None, None, None]
    free.add(0, 48)
    assert policy.choose(free, 16, 16) == 0


@pytest.mark.clause("ME-PLACE-1", "ME-PLACE-2", "ME-PLACE-3", "ME-PLACE-4")
@pytest.mark.parametrize(("name", "offset"), [("best_fit", 48), ("first_fit", 0), ("worst_fit", 80), ("next_fit", 80)])
def test_placement_of_a_manager(small: Any, name: PlacementName, offset: int) -> None:
    manager = small(256, placement=name)
    handles = [manager.allocate_now(size, CPU) for size in (32, 16, 16, 16)]
    manager.deallocate_now(handles[0])
    manager.deallocate_now(handles[2])
    new = manager.allocate_now(16, CPU)
    assert next(row[2] for row in manager.layout(CPU) if row[0] == new) == offset


@pytest.mark.clause("ME-POOL-3", "ME-INFO-1")
@pytest.mark.parametrize(
    ("pool", "committed", "total"),
    [
        ({}, 4096, 4096),
        ({"initial_size": 1 << 30}, 4096, 4096),
        ({"initial_size": 100}, 100, 4096),
        ({"initial_size": 100, "max_size": 1000}, 100, 1000),
        ({"initial_size": 100, "max_size": 1000, "enable_auto_expansion": False}, 100, 100),
        ({"initial_size": 100, "max_size": 1000, "pre_allocate": True}, 1000, 1000),
        ({"initial_size": 100, "max_size": 1000, "pre_allocate": True, "enable_auto_expansion": False}, 1000, 1000),
        ({"initial_size": 100, "pre_allocate": True}, 100, 4096),
    ],
)
def test_start_and_limit(small: Any, pool: dict[str, Any], committed: int, total: int) -> None:
    manager = small(4096, pool=pool)
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == committed
    info = manager.memory_info_now(CPU)
    assert (info.total_bytes, info.free_bytes, info.used_bytes, info.reserved_bytes) == (total, total, 0, 0)


@pytest.mark.clause("ME-POOL-4")
def test_growth_in_whole_steps(small: Any) -> None:
    manager = small(1000, pool={"initial_size": 64, "growth_increment": 100, "max_size": 800})
    committed = []
    for size in (48, 32, 250, 1):  # ends at 48, 80, 336, 352
        manager.allocate_now(size, CPU)
        committed.append(manager.usage(CPU)[MemoryType.General].committed_bytes)
    assert committed == [64, 164, 364, 364]
    manager.allocate_now(440, CPU)  # to 792: cut at the limit, not 864
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 800
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(16, CPU)


@pytest.mark.clause("ME-POOL-4")
def test_growth_moves_nothing_and_is_given_back(small: Any) -> None:
    manager = small(4096, pool={"initial_size": 64, "growth_increment": 64})
    kept = manager.allocate_now(64, CPU)
    view = asyncio.run(manager.map_memory(kept, MemoryAccess.ReadWrite))
    view[3] = 7
    big = manager.allocate_now(1000, CPU)
    manager.fill(big, 255)
    view[4] = 8
    assert manager.read(kept, 2, 3) == b"\7\10"
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 64 + 16 * 64
    manager.deallocate_now(big)
    manager.defragment_now(CPU)
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 64
    assert manager.read(manager.allocate_now(1000, CPU)) == bytes(1000)


@pytest.mark.clause("ME-POOL-4", "ME-ALLOC-2")
def test_pages_given_back_come_back_as_zeros(small: Any) -> None:
    manager = small(1 << 20, pool={"initial_size": 0, "growth_increment": 4096})
    handle = manager.allocate_now(300_000, CPU)
    manager.fill(handle, 255)
    manager.deallocate_now(handle)
    manager.defragment_now(CPU)
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 0
    assert manager.read(manager.allocate_now(300_000, CPU)) == bytes(300_000)


@pytest.mark.clause("ME-POOL-4")
def test_increment_zero_grows_by_what_is_missing(small: Any) -> None:
    manager = small(4096, pool={"initial_size": 0, "growth_increment": 0})
    manager.allocate_now(40, CPU)
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 48
    manager = small(4096, pool={"initial_size": 32, "enable_auto_expansion": False})
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(33, CPU)


@pytest.mark.clause("ME-POOL-5")
def test_configuration_keeps_live_blocks(small: Any) -> None:
    manager = small(4096, pool={"initial_size": 256, "enable_auto_expansion": False})
    handle = manager.allocate_now(40, CPU)
    manager.write(handle, b"kept" * 10)
    asyncio.run(manager.configure_pool(CPU, MemoryPoolConfig(512, 2048, 512, alignment=128)))
    assert manager.memory_info_now(CPU).total_bytes == 2048
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 512
    other = manager.allocate_now(1000, CPU)
    assert {row[0]: row[2] for row in manager.layout(CPU)} == {handle: 0, other: 128}
    assert (manager.read(handle), manager.read(other)) == (b"kept" * 10, bytes(1000))
    manager.check_invariants()
    manager.deallocate_now(other)
    asyncio.run(manager.configure_pool(CPU, MemoryPoolConfig(64, 64)))
    assert manager.memory_info_now(CPU).total_bytes == 64
    assert manager.read(handle) == b"kept" * 10
    manager.check_invariants()


@pytest.mark.clause("ME-POOL-5")
def test_configurations_that_do_not_fit(small: Any) -> None:
    manager = small(4096, pool={"initial_size": 256, "enable_auto_expansion": False})
    low, high = manager.allocate_now(16, CPU), manager.allocate_now(16, CPU)
    before = manager.memory_info_now(CPU)
    with pytest.raises(ResourceExhaustedError, match="byte 32"):
        manager.configure_pool_now(CPU, MemoryPoolConfig(16, 16))
    with pytest.raises(InvalidParameterError, match="power of two"):
        manager.configure_pool_now(CPU, MemoryPoolConfig(alignment=5))
    view = asyncio.run(manager.map_memory(high, MemoryAccess.ReadWrite))
    with pytest.raises(InvalidParameterError, match="unmap"):
        manager.configure_pool_now(CPU, MemoryPoolConfig(1024))
    assert manager.memory_info_now(CPU) == before
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(1000, CPU)
    view[0] = 5
    assert manager.read(high, 1) == b"\5"
    manager.deallocate_now(low)
    manager.check_invariants()


def two_pools(capacity: int = 4096) -> dict[str, Any]:
    pools = {
        MemoryType.General: MemoryPoolConfig(1024, None, 256, alignment=16),
        MemoryType.Cache: MemoryPoolConfig(512, 1024, 256, alignment=64),
    }
    return {"capacity": capacity, "pools": pools}


@pytest.mark.clause("ME-POOL-6", "ME-INFO-1")
def test_types_with_and_without_a_pool(small: Any) -> None:
    manager = small(**two_pools())
    cache = manager.allocate_now(1, CPU, memory_type=MemoryType.Cache)
    tensor = manager.allocate_now(1, CPU, memory_type=MemoryType.Tensor)
    plain = manager.allocate_now(1, CPU)
    rows = {row[0]: row[1:] for row in manager.layout(CPU)}
    assert rows[cache] == (MemoryType.Cache, 0, 64)
    assert (rows[plain], rows[tensor]) == ((MemoryType.General, 16, 16), (MemoryType.General, 0, 16))
    info = manager.handle_info(tensor)
    assert info is not None
    assert info.memory_type is MemoryType.Tensor
    memory = manager.memory_info_now(CPU)
    """General holds 1024 and may take the 2560 nobody holds; 448 idle bytes are the cache's own."""
    assert (memory.total_bytes, memory.used_bytes) == (4096, 96)
    assert (memory.free_bytes, memory.reserved_bytes) == (1024 - 32 + 2560, 448)
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(961, CPU, memory_type=MemoryType.Cache)
    manager.allocate_now(960, CPU, memory_type=MemoryType.Cache)


@pytest.mark.clause("ME-POOL-3", "ME-INFO-1")
def test_capacity_is_shared_and_general_comes_first(small: Any) -> None:
    manager = small(**two_pools(1200))
    committed = {kind: usage.committed_bytes for kind, usage in manager.usage(CPU).items()}
    assert committed == {MemoryType.General: 1024, MemoryType.Cache: 176}
    manager.check_invariants()


@pytest.mark.clause("ME-GC-1")
@pytest.mark.parametrize("enabled", [True, False])
def test_idle_growth_of_another_pool_is_reclaimed(small: Any, enabled: bool) -> None:
    pools = {MemoryType.General: MemoryPoolConfig(0, None, 256, alignment=16), MemoryType.Cache: MemoryPoolConfig(0)}
    manager = small(1536, pools=pools, config={"enable_auto_gc": enabled})
    manager.deallocate_now(manager.allocate_now(1000, CPU))  # General holds 1024, all idle
    if enabled:
        manager.allocate_now(1000, CPU, memory_type=MemoryType.Cache)
    else:
        with pytest.raises(ResourceExhaustedError):
            manager.allocate_now(1000, CPU, memory_type=MemoryType.Cache)


@pytest.mark.clause("ME-GC-1")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_fragmented_pool_is_compacted_when_needed(small: Any, enabled: bool) -> None:
    manager = small(64, config={"enable_auto_gc": enabled, "gc_threshold": 1.0})
    handles = [manager.allocate_now(16, CPU) for _ in range(4)]
    manager.fill(handles[1], 4)
    manager.deallocate_now(handles[0])
    manager.deallocate_now(handles[2])
    if enabled:
        manager.allocate_now(32, CPU)
        assert manager.read(handles[1]) == b"\4" * 16
    else:
        with pytest.raises(ResourceExhaustedError, match="fragmentation"):
            manager.allocate_now(32, CPU)


@pytest.mark.clause("ME-GC-2")
@pytest.mark.parametrize(
    ("threshold", "enabled", "collected"), [(0.5, True, True), (0.5, False, False), (0.6, True, False)]
)
def test_crossing_the_threshold_collects(small: Any, threshold: float, enabled: bool, collected: bool) -> None:
    manager = small(160, config={"enable_auto_gc": enabled, "gc_threshold": threshold})
    handles = [manager.allocate_now(16, CPU) for _ in range(4)]
    manager.deallocate_now(handles[0])
    manager.allocate_now(32, CPU)  # 32 + 48 = 80 of 160, and a hole at 0
    assert (manager.memory_info_now(CPU).fragmentation_ratio == 0.0) is collected
