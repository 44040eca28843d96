"""Device memory against a naive model: one bytearray per handle, figures added up from scratch.

After every step: no two blocks overlap on the device, every handle reads its own bytes (a target of a queued copy once
that was waited for), used + free + reserved = total, and the pressure callback heard exactly the crossings.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ferrum_cupy.host.machine import Host
from ferrum_cupy.memory import CupyMemoryManager
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ferrum_ref.errors import InvalidParameterError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.memory import (
    MemoryHandle,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryPressure,
    MemoryTransfer,
    MemoryType,
    StreamHandle,
)
from ferrum_ref.types.devices import Device

CPU = Device.CPU
TYPES = (MemoryType.General, MemoryType.Cache, MemoryType.Pinned)
GRANULE, CACHE_GRANULE, MAX_BYTES = 8, 16, 1000


class Machine(Host):
    """A device that refuses every further byte while `is_full`."""

    is_full = False

    def allocate_bytes(self, num_bytes: int) -> Any:
        if self.is_full:
            raise ResourceExhaustedError("allocate_bytes: full on purpose")
        return super().allocate_bytes(num_bytes)


@dataclass(eq=False)
class Region:
    """What one block must hold; `streams` have queued copies on it."""

    kind: MemoryType
    data: bytearray
    extent: int
    alignment: int
    loan: ExitStack | None = None
    streams: set[StreamHandle] = field(default_factory=set)

    @property
    def is_fixed(self) -> bool:
        return self.kind is MemoryType.Pinned or self.loan is not None


class MemoryModel:
    """A manager and what it must contain."""

    def __init__(self, seed: int, auto_gc: bool, cache_pool: bool, start: int, step: int) -> None:
        self.auto_gc, self.cache_pool = auto_gc, cache_pool
        pools = {MemoryType.General: MemoryPoolConfig(start, MAX_BYTES, step, alignment=GRANULE)}
        if cache_pool:
            pools[MemoryType.Cache] = MemoryPoolConfig(64, 320, 32, alignment=CACHE_GRANULE)
        config = MemoryManagerConfig(pools, enable_auto_gc=auto_gc, enable_debug=True, max_concurrent_transfers=3)
        self.machine = Machine("no compiler")
        self.machine.queue.rng = random.Random(seed)
        self.total = 1320 if cache_pool else MAX_BYTES
        self.manager = CupyMemoryManager(self.machine, 2000, config)
        self.streams = [self.manager.streams.create_stream_now(CPU) for _ in range(2)]
        self.regions: dict[MemoryHandle, Region] = {}
        self.dead: list[MemoryHandle] = []
        self.heard: list[MemoryPressure] = []
        self.expected: list[MemoryPressure] = []
        self.level = MemoryPressure.Low
        self.manager.set_pressure_callback(self.heard.append)

    def extent(self, size: int, kind: MemoryType) -> int:
        granule = CACHE_GRANULE if self.cache_pool and kind is MemoryType.Cache else GRANULE
        return -(-size // granule) * granule

    def used(self) -> int:
        return sum(region.extent for region in self.regions.values())

    def note_crossing(self) -> None:
        level = MemoryPressure(sum(Fraction(self.used(), self.total) >= Fraction(p, 100) for p in (70, 85, 95)))
        if level is not self.level:
            self.level = level
            self.expected.append(level)

    def must_fit(self, extent: int, alignment: int) -> bool | None:
        """Whether a General allocation must succeed; None where that depends on the layout.  [BK-CUPY-25]"""
        if self.cache_pool:
            return None
        if self.used() + extent > self.total:
            return False
        is_plain = alignment <= GRANULE and all(
            not region.is_fixed and region.alignment <= GRANULE for region in self.regions.values()
        )
        return True if self.auto_gc and is_plain and not self.machine.is_full else None

    def allocate(self, size: int, alignment: int, kind: MemoryType) -> None:
        must = self.must_fit(self.extent(size, kind), alignment)
        try:
            handle = self.manager.allocate_now(size, CPU, alignment, kind)
        except ResourceExhaustedError:
            assert must is not True
            return
        assert must is not False
        assert handle not in self.regions
        assert handle not in self.dead
        self.regions[handle] = Region(kind, bytearray(size), self.extent(size, kind), alignment)
        self.note_crossing()

    def free(self, handle: MemoryHandle) -> None:
        if self.regions[handle].loan is not None:
            with pytest.raises(InvalidParameterError, match="borrowed"):
                self.manager.deallocate_now(handle)
            return
        self.manager.deallocate_now(handle)
        del self.regions[handle]
        self.dead.append(handle)
        self.note_crossing()

    def reallocate(self, handle: MemoryHandle, size: int) -> None:
        region = self.regions[handle]
        if region.loan is not None:
            with pytest.raises(InvalidParameterError, match="borrowed"):
                self.manager.reallocate_now(handle, size)
            return
        try:
            self.manager.reallocate_now(handle, size)
        except ResourceExhaustedError:
            assert size > len(region.data)
            return
        region.data = bytearray(bytes(region.data[:size]).ljust(size, b"\0"))
        region.extent = self.extent(size, region.kind)
        region.streams.clear()  # it waited for them
        self.note_crossing()

    def write(self, handle: MemoryHandle, seed: int) -> None:
        """Random bytes over a random range: by a loan if there is one, else by write or fill."""
        region, rng = self.regions[handle], np.random.default_rng(seed)
        if region.streams:
            return
        start, end = sorted(int(n) for n in rng.integers(0, len(region.data) + 1, 2))
        text = rng.bytes(end - start)
        if region.loan is not None:
            with self.manager.borrow(handle) as array:
                array[start:end] = np.frombuffer(text, np.uint8)
        elif seed % 3:
            self.manager.write(handle, text, start)
        else:
            text = bytes([seed % 256]) * (end - start)
            self.manager.fill(handle, seed % 256, end - start, start)
        region.data[start:end] = text

    def copy(self, src: MemoryHandle, dst: MemoryHandle, seed: int, stream: StreamHandle | None) -> None:
        source, target, rng = self.regions[src], self.regions[dst], np.random.default_rng(seed)
        if (source.streams | target.streams) - {stream}:
            return  # somebody else's work is queued on it, and nothing orders the two
        size, at, to = (int(n) for n in rng.integers(0, 40, 3))
        transfer = MemoryTransfer(src, dst, size, at, to)
        if at + size > len(source.data) or to + size > len(target.data):
            with pytest.raises(InvalidParameterError, match="range"):
                self.manager.copy_async_now(transfer, stream)
            return
        self.manager.copy_async_now(transfer, stream)
        target.data[to : to + size] = bytes(source.data[at : at + size])
        if stream is not None:
            source.streams.add(stream)
            target.streams.add(stream)

    def synchronize(self, stream: StreamHandle) -> None:
        self.manager.streams.synchronize_now(stream)
        for region in self.regions.values():
            region.streams.discard(stream)

    def toggle_loan(self, handle: MemoryHandle) -> None:
        region = self.regions[handle]
        if region.loan is None:
            region.loan = ExitStack()
            region.loan.enter_context(self.manager.borrow(handle))
            region.streams.clear()
        else:
            region.loan.close()
            region.loan = None

    def defragment(self) -> None:
        before = {row[0]: row[2] for row in self.manager.layout(CPU)}
        ratio = self.manager.memory_info_now(CPU).fragmentation_ratio
        stats = self.manager.defragment_now(CPU)
        after = {row[0]: row[2] for row in self.manager.layout(CPU)}
        assert all(after[handle] == before[handle] for handle in before if self.regions[handle].is_fixed)
        assert stats.blocks_moved == sum(after[handle] != before[handle] for handle in before)
        assert stats.memory_freed >= 0
        assert stats.fragmentation_before == ratio
        assert stats.fragmentation_after == self.manager.memory_info_now(CPU).fragmentation_ratio
        assert stats.fragmentation_after <= stats.fragmentation_before
        regions = self.regions.values()
        if all(region.alignment <= GRANULE and not region.is_fixed for region in regions):
            assert stats.fragmentation_after == 0
        assert self.manager.defragment_now(CPU).blocks_moved == 0

    def check(self) -> None:
        self.manager.check_invariants()
        assert self.heard == self.expected
        for handle, region in self.regions.items():
            if not region.streams:
                assert self.manager.read(handle) == region.data
        for handle in self.dead[-3:]:
            with pytest.raises(NotFoundError):
                self.manager.read(handle)
        info, regions = self.manager.memory_info_now(CPU), self.regions.values()
        assert (info.total_bytes, info.used_bytes, info.active_allocations) == (self.total, self.used(), len(regions))
        assert info.used_bytes + info.free_bytes + info.reserved_bytes == info.total_bytes
        usage = self.manager.usage(CPU).values()
        assert sum(one.requested_bytes for one in usage) == sum(len(region.data) for region in regions)
        for one in usage:
            assert one.requested_bytes + one.padding_bytes + one.free_bytes == one.committed_bytes
        position = 0
        for handle, _, address, extent in sorted(self.manager.layout(CPU), key=lambda row: row[2]):
            facts, region = self.manager.handle_info(handle), self.regions[handle]
            assert facts is not None
            assert address >= position
            assert address % max(facts.alignment, region.alignment) == 0
            assert facts.size == len(region.data) <= extent == region.extent
            position = address + extent


class MemoryMachine(RuleBasedStateMachine):
    """Random programs over the model."""

    @initialize(
        seed=st.integers(0, 99), auto_gc=st.booleans(), cache_pool=st.booleans(),
        start=st.sampled_from([0, 100, 512]), step=st.sampled_from([0, 50, 256]),
    )  # fmt: skip
    def start(self, seed: int, auto_gc: bool, cache_pool: bool, start: int, step: int) -> None:
        self.model = MemoryModel(seed, auto_gc, cache_pool, start, step)

    def pick(self, data: st.DataObject) -> MemoryHandle:
        return data.draw(st.sampled_from(list(self.model.regions)))

    @rule(size=st.integers(1, 250), alignment=st.sampled_from([1, 1, 1, 64, 1024]), kind=st.sampled_from(TYPES))
    def allocate(self, size: int, alignment: int, kind: MemoryType) -> None:
        self.model.allocate(size, alignment, kind)

    @rule()
    def defragment(self) -> None:
        self.model.defragment()

    @rule(is_full=st.booleans())
    def fill_the_device(self, is_full: bool) -> None:
        self.model.machine.is_full = is_full

    @rule(which=st.integers(0, 1))
    def synchronize(self, which: int) -> None:
        self.model.synchronize(self.model.streams[which])

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
    @rule(data=st.data(), seed=st.integers(0, 2**32), which=st.integers(0, 2))
    def copy(self, data: st.DataObject, seed: int, which: int) -> None:
        self.model.copy(self.pick(data), self.pick(data), seed, [*self.model.streams, None][which])

    @precondition(lambda self: self.model.regions)
    @rule(data=st.data())
    def toggle_loan(self, data: st.DataObject) -> None:
        self.model.toggle_loan(self.pick(data))

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "model"):
            self.model.check()


CLAUSES = (
    "BK-CUPY-20", "BK-CUPY-21", "BK-CUPY-22", "BK-CUPY-23", "BK-CUPY-24", "BK-CUPY-25", "BK-CUPY-26", "BK-CUPY-27",
)  # fmt: skip

MemoryMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestMemory = pytest.mark.clause(*CLAUSES)(MemoryMachine.TestCase)


class LongMemoryMachine(MemoryMachine):
    """The same, 2,500 steps in all."""


LongMemoryMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
TestMemoryLong = pytest.mark.slow(pytest.mark.clause(*CLAUSES)(LongMemoryMachine.TestCase))


def live(model: MemoryModel, num_steps: int, seed: int) -> None:
    """One long life: as many allocations as the device holds, everything else in between."""
    rng = np.random.default_rng(seed)

    def one_of(items: Any) -> Any:
        return items[int(rng.integers(len(items)))]

    for _ in range(num_steps):
        action, handles, number = float(rng.random()), list(model.regions), int(rng.integers(2**32))
        if action < 0.38 or not handles:
            model.allocate(int(rng.integers(1, 200)), one_of((1, 1, 1, 64)), one_of(TYPES[:2] * 3 + TYPES[2:]))
        elif action < 0.52:
            model.free(one_of(handles))
        elif action < 0.62:
            model.reallocate(one_of(handles), int(rng.integers(1, 250)))
        elif action < 0.72:
            model.write(one_of(handles), number)
        elif action < 0.84:
            model.copy(one_of(handles), one_of(handles), number, one_of([*model.streams, None]))
        elif action < 0.9:
            model.synchronize(one_of(model.streams))
        elif action < 0.94:
            model.toggle_loan(one_of(handles))
        elif action < 0.96:
            model.machine.is_full = not model.machine.is_full and action < 0.945
        else:
            model.defragment()
        model.check()


@pytest.mark.clause(*CLAUSES)
@pytest.mark.parametrize(("auto_gc", "cache_pool"), [(True, False), (True, True), (False, False)])
def test_a_short_life(auto_gc: bool, cache_pool: bool) -> None:
    model = MemoryModel(1, auto_gc, cache_pool, start=100, step=50)
    live(model, 300, seed=1)
    assert len(model.expected) > 10  # the program does cross the thresholds


@pytest.mark.slow
@pytest.mark.clause(*CLAUSES)
@pytest.mark.parametrize("auto_gc", [True, False])
def test_a_life_of_2_000_steps(auto_gc: bool) -> None:
    model = MemoryModel(2, auto_gc, cache_pool=auto_gc, start=100, step=50)
    live(model, 2_000, seed=2)
    assert len(model.expected) > 50  # the program does cross the thresholds
