"""The memory manager against a naive model: one bytearray per handle, figures added up from scratch.

After every step: no two blocks overlap, every handle reads its own bytes, used + free + reserved = total, the pressure
callback has heard exactly the crossings. The same model runs as a state machine and as one program of 10,000 steps.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ferrum_ref.errors import InvalidParameterError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import (
    MemoryAccess,
    MemoryHandle,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryPressure,
    MemoryTransfer,
    MemoryType,
    MemoryUsageHint,
)
from ferrum_ref.numpy_backend.memory import NumpyMemoryManager
from ferrum_ref.numpy_backend.memory.placement import PlacementName
from ferrum_ref.types.devices import Device

DEVICES = (Device.CPU, Device.CUDA(0))
TYPES = (MemoryType.General, MemoryType.Cache, MemoryType.Pinned)
PLACEMENTS: tuple[PlacementName, ...] = ("best_fit", "first_fit", "worst_fit", "next_fit")
GENERAL_ALIGNMENT, CACHE_ALIGNMENT = 8, 16


@dataclass(eq=False)
class Region:
    """What one block must hold; a shared region has two handles."""

    home: Device
    kind: MemoryType
    data: bytearray
    extent: int
    mapping: Any = None
    is_resident: bool = False

    @property
    def is_fixed(self) -> bool:
        in_place = self.kind in (MemoryType.Pinned, MemoryType.Mapped)
        return in_place or self.mapping is not None or self.is_resident


class MemoryModel:
    """A manager of two devices and what it must contain."""

    def __init__(self, placement: PlacementName, auto_gc: bool, cache_pool: bool, start: int, step: int) -> None:
        self.auto_gc, self.cache_pool = auto_gc, cache_pool
        pools = {MemoryType.General: MemoryPoolConfig(start, 1000, step, alignment=GENERAL_ALIGNMENT)}
        if cache_pool:
            pools[MemoryType.Cache] = MemoryPoolConfig(64, 320, 32, alignment=CACHE_ALIGNMENT)
        config = MemoryManagerConfig(pools, enable_auto_gc=auto_gc, enable_debug=True)
        self.capacities = dict(zip(DEVICES, (512, 2000)))
        self.total = {DEVICES[0]: 512, DEVICES[1]: 1320 if cache_pool else 1000}
        self.manager = NumpyMemoryManager(DEVICES[0], 512, config, peers={DEVICES[1]: 2000}, placement=placement)
        self.regions: dict[MemoryHandle, Region] = {}
        self.dead: list[MemoryHandle] = []
        self.heard: list[MemoryPressure] = []
        self.expected: list[MemoryPressure] = []
        self.level = MemoryPressure.Low
        self.manager.set_pressure_callback(self.heard.append)

    def extent(self, size: int, kind: MemoryType) -> int:
        granule = CACHE_ALIGNMENT if self.cache_pool and kind is MemoryType.Cache else GENERAL_ALIGNMENT
        return -(-size // granule) * granule

    def blocks(self, device: Device) -> list[Region]:
        return [region for region in {id(r): r for r in self.regions.values()}.values() if region.home == device]

    def note_crossing(self) -> None:
        fractions = [Fraction(sum(r.extent for r in self.blocks(d)), self.total[d]) for d in DEVICES]
        level = MemoryPressure(max(sum(f >= Fraction(p, 100) for p in (70, 85, 95)) for f in fractions))
        if level is not self.level:
            self.level = level
            self.expected.append(level)

    def must_fit(self, size: int, alignment: int, device: Device) -> bool | None:
        """Whether a General allocation must succeed, by the layout; None where that depends on the compaction."""
        if self.cache_pool:
            return None
        alignment, extent, position, total = max(alignment, 8), self.extent(size, TYPES[0]), 0, self.total[device]
        for _, _, offset, length in [*self.manager.layout(device), (None, None, total, 0)]:
            if -(-position // alignment) * alignment + extent <= offset:
                return True
            position = offset + length
        if not self.auto_gc or sum(r.extent for r in self.blocks(device)) + extent > total:
            return False
        is_plain = alignment == 8 and all(r.kind is MemoryType.General and not r.is_fixed for r in self.blocks(device))
        aligned = any((info := self.manager.handle_info(h)) and info.alignment > 8 for h in self.regions)
        return True if is_plain and not aligned else None

    def allocate(self, size: int, device: Device, alignment: int, kind: MemoryType) -> None:
        must = self.must_fit(size, alignment, device)
        try:
            handle = self.manager.allocate_now(size, device, alignment, kind)
        except ResourceExhaustedError:
            assert must is not True
            return
        assert must is not False
        assert handle not in self.regions
        assert handle not in self.dead
        self.regions[handle] = Region(device, kind, bytearray(size), self.extent(size, kind))
        self.note_crossing()

    def share(self, size: int, home: Device, far: Device) -> None:
        try:
            handles = asyncio.run(self.manager.create_mapping(home, far, size))
        except ResourceExhaustedError:
            return
        region = Region(home, MemoryType.Mapped, bytearray(size), self.extent(size, MemoryType.Mapped))
        self.regions |= dict.fromkeys(handles, region)
        self.note_crossing()

    def free(self, handle: MemoryHandle) -> None:
        if self.regions[handle].mapping is not None and self.manager.handle_info(handle).is_mapped:  # type: ignore[union-attr]
            with pytest.raises(InvalidParameterError, match="mapped"):
                self.manager.deallocate_now(handle)
            return
        self.manager.deallocate_now(handle)
        del self.regions[handle]
        self.dead.append(handle)
        self.note_crossing()

    def reallocate(self, handle: MemoryHandle, size: int) -> None:
        region = self.regions[handle]
        if region.mapping is not None or region.kind is MemoryType.Mapped:
            with pytest.raises(InvalidParameterError, match="reallocate"):
                self.manager.reallocate_now(handle, size)
            return
        try:
            self.manager.reallocate_now(handle, size)
        except ResourceExhaustedError:
            assert size > len(region.data)
            return
        region.data = bytearray(bytes(region.data[:size]).ljust(size, b"\0"))
        region.extent = self.extent(size, region.kind)
        self.note_crossing()

    def write(self, handle: MemoryHandle, seed: int) -> None:
        """Random bytes over a random range: by the mapping if there is one, else by write or fill."""
        region, rng = self.regions[handle], np.random.default_rng(seed)
        start, end = sorted(int(n) for n in rng.integers(0, len(region.data) + 1, 2))
        text = rng.bytes(end - start)
        if region.mapping is not None:
            region.mapping[start:end] = text
        elif seed % 3:
            self.manager.write(handle, text, start)
        else:
            text = bytes([seed % 256]) * (end - start)
            self.manager.fill(handle, seed % 256, end - start, start)
        region.data[start:end] = text

    def copy(self, src: MemoryHandle, dst: MemoryHandle, seed: int) -> None:
        source, target, rng = self.regions[src].data, self.regions[dst].data, np.random.default_rng(seed)
        size, at, to = (int(n) for n in rng.integers(0, 40, 3))
        transfer = MemoryTransfer(src, dst, size, at, to)
        if at + size > len(source) or to + size > len(target):
            with pytest.raises(InvalidParameterError, match="range"):
                self.manager.copy_now(transfer)
            return
        self.manager.copy_now(transfer)
        target[to : to + size] = bytes(source[at : at + size])

    def toggle_mapping(self, handle: MemoryHandle) -> None:
        region = self.regions[handle]
        if region.mapping is None:
            region.mapping = asyncio.run(self.manager.map_memory(handle, MemoryAccess.ReadWrite))
        elif self.manager.handle_info(handle).is_mapped:  # type: ignore[union-attr]
            asyncio.run(self.manager.unmap_memory(handle))
            region.mapping = None

    def toggle_resident(self, handle: MemoryHandle) -> None:
        region = self.regions[handle]
        region.is_resident = not region.is_resident
        hint = MemoryUsageHint.Resident if region.is_resident else MemoryUsageHint.Random
        asyncio.run(self.manager.set_usage_hint(handle, hint))

    def prefetch(self, handle: MemoryHandle, target: Device) -> None:
        region = self.regions[handle]
        try:
            asyncio.run(self.manager.prefetch(handle, target))
        except InvalidParameterError:
            assert region.is_fixed
            assert region.home != target
            return
        except ResourceExhaustedError:
            return
        region.home = target
        self.note_crossing()

    def defragment(self, device: Device) -> None:
        fixed = {handle: region for handle, region in self.regions.items() if region.is_fixed}
        before = {row[0]: row[2] for row in self.manager.layout(device)}
        info = self.manager.memory_info_now(device)
        span = {row[1]: row[2] + row[3] for row in self.manager.layout(device)}
        stats = self.manager.defragment_now(device)
        after = {row[0]: row[2] for row in self.manager.layout(device)}
        new_span = {row[1]: row[2] + row[3] for row in self.manager.layout(device)}
        assert all(after[handle] <= offset for handle, offset in before.items())
        assert all(after[handle] == before[handle] for handle in fixed if handle in before)
        assert stats.blocks_moved == sum(after[handle] != before[handle] for handle in before)
        assert stats.memory_freed == sum(span.values()) - sum(new_span.values())
        assert stats.fragmentation_before == info.fragmentation_ratio
        assert stats.fragmentation_after == self.manager.memory_info_now(device).fragmentation_ratio
        assert stats.fragmentation_after <= stats.fragmentation_before

    def check(self) -> None:
        self.manager.check_invariants()
        assert self.heard == self.expected
        for handle, region in self.regions.items():
            assert self.manager.read(handle) == region.data
        for handle in self.dead[-3:]:
            with pytest.raises(NotFoundError):
                self.manager.read(handle)
        for device in DEVICES:
            self.check_device(device)

    def check_device(self, device: Device) -> None:
        info, blocks = self.manager.memory_info_now(device), self.blocks(device)
        assert info.total_bytes == self.total[device]
        assert info.used_bytes == sum(region.extent for region in blocks)
        assert info.used_bytes + info.free_bytes + info.reserved_bytes == info.total_bytes
        assert info.active_allocations == len(blocks)
        usage = self.manager.usage(device).values()
        assert sum(u.committed_bytes for u in usage) <= self.capacities[device]
        assert sum(u.requested_bytes for u in usage) == sum(len(region.data) for region in blocks)
        for one in usage:
            assert one.requested_bytes + one.padding_bytes + one.free_bytes == one.committed_bytes
        rows = {(pool, offset, extent) for _, pool, offset, extent in self.manager.layout(device)}
        for pool in {row[0] for row in rows}:
            position = 0
            for _, offset, extent in sorted((row for row in rows if row[0] is pool), key=lambda row: row[1]):
                assert offset >= position
                position = offset + extent
            assert position <= self.manager.usage(device)[pool].committed_bytes
        for handle, _, offset, extent in self.manager.layout(device):
            facts = self.manager.handle_info(handle)
            assert facts is not None
            assert offset % facts.alignment == 0
            assert facts.size == len(self.regions[handle].data) <= extent == self.regions[handle].extent


class MemoryMachine(RuleBasedStateMachine):
    """Random programs over the model."""

    @initialize(
        placement=st.sampled_from(PLACEMENTS), auto_gc=st.booleans(), cache_pool=st.booleans(),
        start=st.sampled_from([0, 100, 512]), step=st.sampled_from([0, 50, 256]),
    )  # fmt: skip
    def start(self, placement: PlacementName, auto_gc: bool, cache_pool: bool, start: int, step: int) -> None:
        self.model = MemoryModel(placement, auto_gc, cache_pool, start, step)

    def pick(self, data: st.DataObject) -> MemoryHandle:
        return data.draw(st.sampled_from(list(self.model.regions)))

    @rule(
        size=st.integers(1, 200), device=st.sampled_from(DEVICES), alignment=st.sampled_from([1, 1, 1, 32, 64]),
        kind=st.sampled_from(TYPES),
    )  # fmt: skip
    def allocate(self, size: int, device: Device, alignment: int, kind: MemoryType) -> None:
        self.model.allocate(size, device, alignment, kind)

    @rule(size=st.integers(1, 60), home=st.sampled_from(DEVICES), far=st.sampled_from(DEVICES))
    def share(self, size: int, home: Device, far: Device) -> None:
        self.model.share(size, home, far)

    @rule(device=st.sampled_from(DEVICES))
    def defragment(self, device: Device) -> None:
        self.model.defragment(device)

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.model.free(self.pick(data))

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data(), size=st.integers(1, 250))
    def reallocate(self, data: st.DataObject, size: int) -> None:
        self.model.reallocate(self.pick(data), size)

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data(), seed=st.integers(0, 2**32))
    def write(self, data: st.DataObject, seed: int) -> None:
        self.model.write(self.pick(data), seed)

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data(), seed=st.integers(0, 2**32))
    def copy(self, data: st.DataObject, seed: int) -> None:
        self.model.copy(self.pick(data), self.pick(data), seed)

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data())
    def toggle_mapping(self, data: st.DataObject) -> None:
        self.model.toggle_mapping(self.pick(data))

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data())
    def toggle_resident(self, data: st.DataObject) -> None:
        self.model.toggle_resident(self.pick(data))

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data(), goal=st.sampled_from(DEVICES))
    def prefetch(self, data: st.DataObject, goal: Device) -> None:
        self.model.prefetch(self.pick(data), goal)

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "model"):
            self.model.check()


CLAUSES = (
    "ME-ALLOC-2", "ME-ALLOC-3", "ME-ALLOC-4", "ME-ALLOC-6", "ME-INFO-1", "ME-INFO-2", "ME-PRESSURE-4", "ME-DEFRAG-1",
    "ME-DEFRAG-2", "ME-DEFRAG-3", "ME-DEFRAG-4", "ME-REALLOC-1", "ME-COPY-1", "ME-COPY-2", "ME-MAP-1", "ME-SHARE-1",
    "ME-SHARE-2", "ME-SHARE-3", "ME-GC-1",
)  # fmt: skip

MemoryMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestMemory = pytest.mark.clause(*CLAUSES)(MemoryMachine.TestCase)


class LongMemoryMachine(MemoryMachine):
    """The same, 10,000 steps in all."""


LongMemoryMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)
TestMemoryLong = pytest.mark.slow(pytest.mark.clause(*CLAUSES)(LongMemoryMachine.TestCase))


def run_program(model: MemoryModel, num_steps: int, seed: int) -> None:
    """One long life: as many allocations as the devices hold, everything else in between."""
    rng = np.random.default_rng(seed)

    def one_of(items: Any) -> Any:
        return items[int(rng.integers(len(items)))]

    for _ in range(num_steps):
        action, handles = float(rng.random()), list(model.regions)
        if action < 0.3 or not handles:
            model.allocate(int(rng.integers(1, 200)), one_of(DEVICES), one_of((1, 1, 1, 64)), one_of(TYPES))
        elif action < 0.5:
            model.free(one_of(handles))
        elif action < 0.6:
            model.reallocate(one_of(handles), int(rng.integers(1, 250)))
        elif action < 0.7:
            model.write(one_of(handles), int(rng.integers(2**32)))
        elif action < 0.76:
            model.copy(one_of(handles), one_of(handles), int(rng.integers(2**32)))
        elif action < 0.82:
            model.toggle_mapping(one_of(handles))
        elif action < 0.85:
            model.toggle_resident(one_of(handles))
        elif action < 0.91:
            model.prefetch(one_of(handles), one_of(DEVICES))
        elif action < 0.94:
            model.share(int(rng.integers(1, 60)), one_of(DEVICES), one_of(DEVICES))
        else:
            model.defragment(one_of(DEVICES))
        model.check()


@pytest.mark.clause(*CLAUSES)
@pytest.mark.parametrize("auto_gc", [True, False])
def test_a_short_life(auto_gc: bool) -> None:
    model = MemoryModel("best_fit", auto_gc, cache_pool=True, start=100, step=50)
    run_program(model, 300, seed=1)
    assert len(model.expected) > 10  # the program does cross the thresholds


@pytest.mark.slow
@pytest.mark.clause(*CLAUSES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_life_of_10_000_steps(placement: PlacementName) -> None:
    model = MemoryModel(placement, placement != "first_fit", placement in ("best_fit", "next_fit"), start=100, step=50)
    run_program(model, 10_000, seed=2)
    assert len(model.expected) > 150  # the program does cross the thresholds
