"""Host mappings, shared regions, migration, hints, access statistics."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.memory import AccessPatternType, MemoryAccess, MemoryTransfer, MemoryType, MemoryUsageHint
from ferrum_ref.numpy_backend.memory.access import AccessLog, classify
from ferrum_ref.types.devices import Device

CPU, CUDA = Device.CPU, Device.CUDA(0)


@pytest.mark.clause("ME-MAP-1")
@pytest.mark.parametrize("access", list(MemoryAccess))
def test_a_mapping_is_the_memory_itself(small: Any, access: MemoryAccess) -> None:
    manager = small()
    handle = manager.allocate_now(10, CPU)
    manager.write(handle, b"0123456789")
    view = asyncio.run(manager.map_memory(handle, access))
    assert isinstance(view, memoryview)
    assert (view.nbytes, view.format, bytes(view)) == (10, "B", b"0123456789")
    assert view.readonly is (access is MemoryAccess.ReadOnly)
    manager.write(handle, b"x", 3)
    assert view[3] == ord("x")
    if view.readonly:
        with pytest.raises(TypeError):
            view[0] = 1
    else:
        view[9] = ord("y")
        assert manager.read(handle) == b"012x45678y"
    with pytest.raises(IndexError):
        view[10]


@pytest.mark.clause("ME-MAP-2")
def test_one_mapping_that_ends(small: Any) -> None:
    manager = small()
    handle = manager.allocate_now(10, CPU)
    view = asyncio.run(manager.map_memory(handle, MemoryAccess.ReadWrite))
    with pytest.raises(AlreadyExistsError, match="is mapped"):
        asyncio.run(manager.map_memory(handle, MemoryAccess.ReadOnly))
    asyncio.run(manager.unmap_memory(handle))
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(InvalidParameterError, match="not mapped"):
        asyncio.run(manager.unmap_memory(handle))
    assert not asyncio.run(manager.map_memory(handle, MemoryAccess.WriteOnly)).readonly


@pytest.mark.clause("ME-MAP-3")
@pytest.mark.parametrize("kind", ["array", "slice"])
def test_arrays_and_slices_hold_a_mapping(small: Any, kind: str) -> None:
    manager = small()
    handle = manager.allocate_now(8, CPU)
    view = asyncio.run(manager.map_memory(handle, MemoryAccess.ReadWrite))
    array = np.frombuffer(view, np.uint16) if kind == "array" else view[:].cast("H")
    for _ in range(2):
        with pytest.raises(InvalidParameterError, match="drop them"):
            asyncio.run(manager.unmap_memory(handle))
        with pytest.raises(ValueError, match="released"):
            view[0]
        with pytest.raises(InvalidParameterError, match="mapped"):
            manager.deallocate_now(handle)
    info = manager.handle_info(handle)
    assert info is not None
    assert info.is_mapped
    array[1] = 0x0201
    assert manager.read(handle) == b"\0\0\1\2\0\0\0\0"
    del array
    asyncio.run(manager.unmap_memory(handle))


@pytest.mark.clause("ME-SHARE-1")
def test_a_shared_region_is_one_region(small: Any) -> None:
    manager = small(peers={CUDA: 4096})
    near, far = asyncio.run(manager.create_mapping(CPU, CUDA, 20))
    manager.write(near, b"from near")
    manager.write(far, b"from far", 10)
    assert manager.read(near) == manager.read(far) == b"from near\0from far\0\0"
    infos = [manager.handle_info(handle) for handle in (near, far)]
    assert [(i.device, i.memory_type, i.size) for i in infos if i] == [
        (CPU, MemoryType.Mapped, 20),
        (CUDA, MemoryType.Mapped, 20),
    ]
    assert (manager.memory_info_now(CPU).used_bytes, manager.memory_info_now(CUDA).used_bytes) == (32, 0)
    assert manager.memory_info_now(CPU).active_allocations == 1
    with pytest.raises(UnsupportedError):
        asyncio.run(manager.create_mapping(CPU, Device.Metal, 20))
    with pytest.raises(InvalidParameterError):
        asyncio.run(manager.create_mapping(CPU, CUDA, 0))
    with pytest.raises(ResourceExhaustedError):
        asyncio.run(manager.create_mapping(CPU, CUDA, 4096))
    manager.check_invariants()


@pytest.mark.clause("ME-SHARE-2")
@pytest.mark.parametrize("first", [0, 1])
def test_a_shared_region_lives_as_long_as_a_handle(small: Any, first: int) -> None:
    manager = small(peers={CUDA: 4096})
    handles = asyncio.run(manager.create_mapping(CPU, CUDA, 20))
    manager.fill(handles[0], 6)
    manager.deallocate_now(handles[first])
    assert manager.read(handles[1 - first]) == b"\6" * 20
    with pytest.raises(NotFoundError):
        manager.read(handles[first])
    assert manager.memory_info_now(CPU).used_bytes == 32
    manager.deallocate_now(handles[1 - first])
    assert manager.memory_info_now(CPU).used_bytes == 0


@pytest.mark.clause("ME-SHARE-3")
def test_prefetch_moves_the_block(small: Any, clock: Any) -> None:
    manager = small(peers={CUDA: 4096})
    clock.now_s = 5.0
    handle = manager.allocate_now(20, CPU, 64)
    manager.write(handle, b"12345678901234567890")
    clock.now_s = 6.0
    asyncio.run(manager.prefetch(handle, CUDA))
    info = manager.handle_info(handle)
    assert info is not None
    assert (info.device, info.size, info.alignment, info.allocated_at) == (CUDA, 20, 64, 5.0)
    assert manager.read(handle) == b"12345678901234567890"
    assert (manager.memory_info_now(CPU).used_bytes, manager.memory_info_now(CUDA).used_bytes) == (0, 32)
    stats = manager.access_stats(handle)
    assert stats is not None
    assert stats.write_count == 1
    asyncio.run(manager.prefetch(handle, CUDA))
    manager.check_invariants()


@pytest.mark.clause("ME-SHARE-3")
def test_what_is_not_prefetched(small: Any) -> None:
    manager = small(peers={CUDA: 64})
    big, pinned, mapped = (
        manager.allocate_now(size, CPU, 1, kind)
        for size, kind in ((65, MemoryType.General), (8, MemoryType.Pinned), (8, MemoryType.General))
    )
    asyncio.run(manager.map_memory(mapped, MemoryAccess.ReadOnly))
    manager.fill(big, 3)
    with pytest.raises(ResourceExhaustedError, match="cuda:0"):
        asyncio.run(manager.prefetch(big, CUDA))
    for handle, why in ((pinned, "Pinned"), (mapped, "mapped")):
        with pytest.raises(InvalidParameterError, match=why):
            asyncio.run(manager.prefetch(handle, CUDA))
    with pytest.raises(UnsupportedError):
        asyncio.run(manager.prefetch(big, Device.Metal))
    assert manager.read(big) == b"\3" * 65
    assert manager.memory_info_now(CUDA).used_bytes == 0


@pytest.mark.clause("ME-ACCESS-3")
def test_hints_are_remembered(small: Any) -> None:
    manager = small()
    handle = manager.allocate_now(8, CPU)
    assert manager.usage_hint(handle) is None
    for hint in MemoryUsageHint:
        asyncio.run(manager.set_usage_hint(handle, hint))
        assert manager.usage_hint(handle) is hint


@pytest.mark.clause("ME-ACCESS-1")
def test_access_counters(small: Any, clock: Any) -> None:
    manager = small()
    clock.now_s = 1.0
    a, b = manager.allocate_now(100, CPU), manager.allocate_now(100, CPU)
    stats = manager.access_stats(a)
    assert stats is not None
    assert (stats.read_count, stats.write_count, stats.avg_read_size, stats.last_access) == (0, 0, 0, 1.0)
    clock.now_s = 2.0
    manager.write(a, bytes(10))
    manager.fill(a, 1, 15)
    clock.now_s = 3.0
    manager.copy_now(MemoryTransfer.new(a, b, 7))
    clock.now_s = 4.0
    manager.read(a, 2)
    for handle, figures in ((a, (2, 2, 4, 12, 4.0)), (b, (0, 1, 0, 7, 3.0))):
        stats = manager.access_stats(handle)
        assert stats is not None
        found = (stats.read_count, stats.write_count, stats.avg_read_size, stats.avg_write_size, stats.last_access)
        assert found == figures


@pytest.mark.clause("ME-ACCESS-1")
@pytest.mark.parametrize("off", [{"config": {"enable_tracking": False}}, {"pool": {"enable_stats": False}}])
def test_untracked(small: Any, off: dict[str, Any]) -> None:
    manager = small(**off)
    handle = manager.allocate_now(8, CPU)
    manager.fill(handle, 1)
    assert manager.access_stats(handle) is None


@pytest.mark.clause("ME-ACCESS-2")
@pytest.mark.parametrize(
    ("offsets", "times", "pattern"),
    [
        ([0, 8, 16], [0, 1, 2], AccessPatternType.Unknown),
        ([0, 8, 16, 24], [0, 1, 2, 3], AccessPatternType.Sequential),
        ([0, 8, 16, 24, 0], [0, 1, 2, 3, 4], AccessPatternType.Sequential),
        ([0, 8, 0, 40], [0, 1, 2, 3], AccessPatternType.Mixed),
        ([0, 16, 0, 40], [0, 1, 2, 3], AccessPatternType.Random),
        ([0, 8, 0, 40, 3], [0, 1, 2, 3, 4], AccessPatternType.Random),
        ([0, 16, 0, 40, 3], [0, 0.1, 0.2, 0.3, 100], AccessPatternType.Burst),
        ([0, 8, 16, 24, 32], [0, 0.1, 0.2, 0.3, 100], AccessPatternType.Sequential),
        ([0, 16, 0, 40], [5, 5, 5, 5], AccessPatternType.Random),
    ],
)
def test_patterns(offsets: list[int], times: list[float], pattern: AccessPatternType) -> None:
    assert classify([(offset, 8, time) for offset, time in zip(offsets, times)]) is pattern


@pytest.mark.clause("ME-ACCESS-2")
def test_only_the_last_64_count() -> None:
    log = AccessLog(0.0)
    for index in range(64):
        log.read(8 * (index * 7 % 13), 8, float(index))
    assert log.stats().pattern_type is AccessPatternType.Random
    for index in range(64):
        log.read(8 * index, 8, 64.0 + index)
    assert log.stats().pattern_type is AccessPatternType.Sequential
