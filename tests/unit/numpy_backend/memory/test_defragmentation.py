"""Defragmentation: blocks really move, contents stay, statistics are exact."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ferrum_ref.interfaces.memory import (
    DefragmentationStats,
    MemoryAccess,
    MemoryHandle,
    MemoryPressure,
    MemoryType,
    MemoryUsageHint,
)
from ferrum_ref.numpy_backend.memory import NumpyMemoryManager
from ferrum_ref.types.devices import Device

CPU, CUDA = Device.CPU, Device.CUDA(0)


def offsets(manager: NumpyMemoryManager) -> dict[MemoryHandle, int]:
    return {row[0]: row[2] for row in manager.layout(CPU)}


@pytest.mark.clause("ME-DEFRAG-1", "ME-DEFRAG-2", "ME-DEFRAG-4", "ME-INFO-3")
def test_holes_close(small: Any, clock: Any) -> None:
    manager = small(256)
    handles = [manager.allocate_now(16, CPU) for _ in range(8)]
    for number, handle in enumerate(handles):
        manager.fill(handle, number)
    for index in (0, 2, 3, 6):
        manager.deallocate_now(handles[index])
    kept = [handles[index] for index in (1, 4, 5, 7)]
    assert manager.memory_info_now(CPU).fragmentation_ratio == 0.5  # 64 of 128 bytes below the last block
    clock.step_s = 0.0019
    stats = asyncio.run(manager.defragment(CPU))
    assert stats == DefragmentationStats(64, 4, 1, 0.5, 0.0)
    assert offsets(manager) == {handle: 16 * place for place, handle in enumerate(kept)}
    assert [manager.read(handle)[0] for handle in kept] == [1, 4, 5, 7]
    assert manager.defragment_now(CPU) == DefragmentationStats(0, 0, 1, 0.0, 0.0)
    manager.allocate_now(192, CPU)


@pytest.mark.clause("ME-DEFRAG-2")
def test_a_block_that_overlaps_its_new_place(small: Any) -> None:
    manager = small(256)
    gap, long = manager.allocate_now(16, CPU), manager.allocate_now(100, CPU)
    manager.write(long, bytes(range(100)))
    manager.deallocate_now(gap)
    assert manager.defragment_now(CPU).blocks_moved == 1
    assert offsets(manager)[long] == 0
    assert manager.read(long) == bytes(range(100))


@pytest.mark.clause("ME-DEFRAG-1")
def test_alignment_is_kept_and_small_blocks_fill_the_gaps(small: Any) -> None:
    manager = small(512)
    gap = manager.allocate_now(96, CPU)
    first, aligned, last = (
        manager.allocate_now(16, CPU),
        manager.allocate_now(16, CPU, 128),
        manager.allocate_now(16, CPU, 64),
    )
    manager.allocate_now(16, CPU)
    manager.deallocate_now(gap)
    manager.defragment_now(CPU)
    found = offsets(manager)
    assert (found[first], found[aligned], found[last]) == (0, 128, 64)
    manager.check_invariants()


@pytest.mark.clause("ME-DEFRAG-3")
@pytest.mark.parametrize("why", ["mapped", "pinned", "shared", "resident"])
def test_what_stays_in_place(small: Any, why: str) -> None:
    manager = small(256)
    gap = manager.allocate_now(64, CPU)
    kind = MemoryType.Pinned if why == "pinned" else MemoryType.General
    fixed = manager.allocate_now(16, CPU, memory_type=kind)
    if why == "shared":
        manager.deallocate_now(fixed)
        fixed, _ = asyncio.run(manager.create_mapping(CPU, CPU, 16))
    behind = manager.allocate_now(16, CPU)
    manager.fill(behind, 8)
    if why == "mapped":
        view = asyncio.run(manager.map_memory(fixed, MemoryAccess.ReadWrite))
    if why == "resident":
        asyncio.run(manager.set_usage_hint(fixed, MemoryUsageHint.Resident))
    manager.deallocate_now(gap)
    stats = manager.defragment_now(CPU)
    assert (stats.blocks_moved, stats.memory_freed) == (1, 16)
    assert (offsets(manager)[fixed], offsets(manager)[behind]) == (64, 0)
    assert manager.read(behind) == b"\10" * 16
    if why == "mapped":
        view[0] = 3
        assert manager.read(fixed)[0] == 3
        asyncio.run(manager.unmap_memory(fixed))
    if why == "resident":
        asyncio.run(manager.set_usage_hint(fixed, MemoryUsageHint.Random))
    if why in ("mapped", "resident"):
        assert manager.defragment_now(CPU).blocks_moved == 1
        assert offsets(manager)[fixed] == 16


@pytest.mark.clause("ME-DEFRAG-5")
def test_figures_of_use_stay(small: Any) -> None:
    manager = small(256, peers={CUDA: 256})
    handles = [manager.allocate_now(size, device) for device in (CPU, CUDA) for size in (20, 170)]
    for index in (0, 2):
        manager.deallocate_now(handles[index])
    heard: list[MemoryPressure] = []
    manager.set_pressure_callback(heard.append)
    before, other = manager.memory_info_now(CPU), manager.layout(CUDA)
    assert manager.defragment_now(CPU).blocks_moved == 1
    after = manager.memory_info_now(CPU)
    assert (after.total_bytes, after.used_bytes, after.free_bytes) == (
        before.total_bytes, before.used_bytes, before.free_bytes,
    )  # fmt: skip
    assert (manager.layout(CUDA), heard) == (other, [])


@pytest.mark.clause("ME-INFO-3")
def test_fragmentation_ratio(small: Any) -> None:
    manager = small(96)
    assert manager.memory_info_now(CPU).fragmentation_ratio == 0.0
    handles = [manager.allocate_now(16, CPU) for _ in range(3)]
    assert manager.memory_info_now(CPU).fragmentation_ratio == 0.0  # the free end does not count
    manager.deallocate_now(handles[0])
    assert manager.memory_info_now(CPU).fragmentation_ratio == 0.3333333432674408  # float32 next to 1/3
    manager.deallocate_now(handles[2])
    assert manager.memory_info_now(CPU).fragmentation_ratio == 0.5
