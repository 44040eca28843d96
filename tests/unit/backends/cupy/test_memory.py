"""Device memory with numpy in CuPy's place: regions, handles, pressure, copies, and what the backend hands out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ferrum_cupy.backend import CupyBackend
from ferrum_cupy.host.machine import Host
from ferrum_cupy.memory import CupyMemoryManager
from ferrum_cupy.memory_factory import CupyMemoryManagerFactory
from ferrum_cupy.memory_moves import BOUNCE_BYTES

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
    MemoryHandle,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryPressure,
    MemoryTransfer,
    MemoryType,
)
from ferrum_ref.numpy_backend.memory import NumpyGlobalMemoryMonitor
from ferrum_ref.types.devices import Device

CPU = Device.CPU
Low, Medium, High, Critical = MemoryPressure
Make = Callable[..., CupyMemoryManager]


class Machine(Host):
    """A host whose device has `left_bytes` to give; `asked` is what it gave."""

    def __init__(self) -> None:
        super().__init__("no compiler")
        self.left_bytes = 1 << 40
        self.asked: list[int] = []

    def allocate_bytes(self, num_bytes: int) -> Any:
        if num_bytes > self.left_bytes:
            raise ResourceExhaustedError(f"allocate_bytes: no {num_bytes} bytes left")
        self.asked.append(num_bytes)
        return super().allocate_bytes(num_bytes)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def small(machine: Machine) -> Make:
    """small(capacity, alignment, pool={}, config={}): all of it in one region at the start, checked at every step."""

    def make(capacity: int = 1000, alignment: int = 1, pool: Any = None, **config: Any) -> CupyMemoryManager:
        general = MemoryPoolConfig(**{"initial_size": capacity, "alignment": alignment, **(pool or {})})
        pools = {MemoryType.General: general, **config.pop("pools", {})}
        settings = MemoryManagerConfig(**{"pool_configs": pools, "enable_debug": True, **config})
        return CupyMemoryManager(machine, capacity, settings)

    return make


@pytest.mark.clause("BK-CUPY-20", "BK-CUPY-23")
def test_the_backends_manager() -> None:
    backend = CupyBackend(Host("no compiler"))
    manager = backend.memory_manager()
    assert backend.memory_manager() is manager
    info = asyncio.run(manager.memory_info(CPU))
    assert (info.total_bytes, info.used_bytes, info.pressure_level()) == (4 << 30, 0, Low)
    monitor = NumpyGlobalMemoryMonitor()
    monitor.register_manager(CPU, manager)
    heard: list[Any] = []
    monitor.set_global_pressure_callback(heard.append)
    asyncio.run(manager.configure_pool(CPU, MemoryPoolConfig(1024, 1024)))
    handle = asyncio.run(manager.allocate(1000, CPU))
    asyncio.run(manager.deallocate(handle))
    assert heard == [{CPU: Critical}, {CPU: Low}]
    for call in (manager.allocate(1, Device.CUDA(0)), manager.memory_info(Device.CUDA(0))):
        with pytest.raises(UnsupportedError, match="no memory of device cuda:0 here; this manager has cpu"):
            asyncio.run(call)


@pytest.mark.clause("BK-CUPY-20")
def test_nothing_works_after_shutdown() -> None:
    backend = CupyBackend(Host("no compiler"))
    manager = backend.memory_manager()
    handle = manager.allocate_now(8, CPU)
    stream = manager.streams.create_stream_now(CPU)
    asyncio.run(backend.shutdown())
    calls: list[Callable[[], Any]] = [
        backend.memory_manager,
        lambda: manager.allocate_now(1, CPU),
        lambda: manager.read(handle),
        lambda: manager.write(handle, b"1"),
        lambda: manager.fill(handle, 1),
        lambda: manager.copy_now(MemoryTransfer.new(handle, handle, 1)),
        lambda: manager.copy_async_now(MemoryTransfer.new(handle, handle, 1), stream),
        lambda: manager.reallocate_now(handle, 9),
        lambda: manager.deallocate_now(handle),
        lambda: manager.defragment_now(CPU),
        lambda: manager.borrow(handle).__enter__(),
        lambda: manager.streams.create_stream_now(CPU),
        lambda: manager.streams.record_event_now(stream),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="was shut down"):
            call()


@pytest.mark.clause("BK-CUPY-20")
def test_the_factory(machine: Machine) -> None:
    async def main() -> None:
        factory = CupyMemoryManagerFactory(machine, 5000)
        config = MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(100)})
        one, two = [await factory.create_memory_manager(CPU, config) for _ in range(2)]
        assert one.streams is two.streams is await factory.create_stream_manager(CPU)
        handle = await one.allocate(10, CPU)
        assert (await two.memory_info(CPU)).used_bytes == 0
        assert two.handle_info(handle) is None
        with pytest.raises(UnsupportedError, match="cannot be mapped into the host"):
            await factory.create_advanced_memory_manager(CPU, config)
        for create in (factory.create_memory_manager, factory.create_advanced_memory_manager):
            with pytest.raises(UnsupportedError, match="no device cuda:1 here"):
                await create(Device.CUDA(1), config)
        with pytest.raises(UnsupportedError, match="no device cuda:1 here"):
            await factory.create_stream_manager(Device.CUDA(1))

    asyncio.run(main())


@pytest.mark.clause("BK-CUPY-20")
def test_handles_die_for_good(small: Make) -> None:
    manager = small()
    first = manager.allocate_now(10, CPU)
    facts = manager.handle_info(first)
    assert facts is not None
    assert (facts.size, facts.device, facts.alignment, facts.is_mapped) == (10, CPU, 1, False)
    manager.deallocate_now(first)
    second = manager.allocate_now(10, CPU)
    assert second != first
    assert second.id() & 0xFFFFFFFF == first.id() & 0xFFFFFFFF  # the slot serves again
    for handle, fault in ((first, "freed"), (MemoryHandle(0), "null"), (MemoryHandle(99), "unknown to this manager")):
        assert manager.handle_info(handle) is None
        with pytest.raises(NotFoundError, match=fault):
            manager.deallocate_now(handle)
        with pytest.raises(NotFoundError, match=fault):
            manager.read(handle)


@pytest.mark.clause("BK-CUPY-21")
def test_a_region_is_taken_when_it_is_needed_and_given_back(small: Make, machine: Machine) -> None:
    manager = small(1000)
    assert machine.asked == []
    first = manager.allocate_now(10, CPU)
    manager.allocate_now(10, CPU)
    assert machine.asked == [1000]
    manager.deallocate_now(first)
    for handle, *_ in manager.layout(CPU):
        manager.deallocate_now(handle)
    manager.defragment_now(CPU)
    manager.allocate_now(10, CPU)
    assert machine.asked == [1000, 1000]
    small(500, pool={"pre_allocate": True})
    assert machine.asked == [1000, 1000, 500]


@pytest.mark.clause("BK-CUPY-21")
def test_a_device_that_has_no_more(small: Make, machine: Machine) -> None:
    manager = small(1000, pool={"initial_size": 100, "growth_increment": 100})
    kept = manager.allocate_now(100, CPU)
    manager.fill(kept, 7)
    machine.left_bytes = 50
    before = manager.memory_info_now(CPU), manager.layout(CPU)
    with pytest.raises(ResourceExhaustedError, match="no room for 60 bytes on cpu: 900 of 1000 bytes free"):
        manager.allocate_now(60, CPU)
    with pytest.raises(ResourceExhaustedError):
        manager.reallocate_now(kept, 150)
    assert (manager.memory_info_now(CPU), manager.layout(CPU)) == before
    assert manager.read(kept) == bytes([7]) * 100
    with pytest.raises(ResourceExhaustedError, match="no 500 bytes left"):
        small(500, pool={"pre_allocate": True})
    machine.left_bytes = 1000
    manager.allocate_now(60, CPU)


@pytest.mark.clause("BK-CUPY-22")
def test_what_a_growing_pool_takes(small: Make, machine: Machine) -> None:
    manager = small(1000, pool={"initial_size": 100, "growth_increment": 50})
    manager.allocate_now(80, CPU)
    second = manager.allocate_now(40, CPU)
    assert machine.asked == [100, 50]
    third = manager.allocate_now(5, CPU)  # 20 bytes are left in one region, 10 in the other
    places = {row[0]: row[2] for row in manager.layout(CPU)}
    assert places[third] == places[second] + 40
    whole = small(1000, pool={"initial_size": 100, "growth_increment": 50})
    whole.allocate_now(120, CPU)  # the first region is empty and becomes part of it
    assert machine.asked[2:] == [150]
    exact = small(1000, pool={"initial_size": 0, "growth_increment": 0})
    exact.allocate_now(33, CPU)
    assert machine.asked[3:] == [33]
    limited = small(1000, pool={"initial_size": 100, "growth_increment": 70, "max_size": 120})
    assert limited.memory_info_now(CPU).free_bytes == 120
    limited.allocate_now(115, CPU)
    assert machine.asked[4:] == [120]
    fixed = small(1000, pool={"initial_size": 100, "enable_auto_expansion": False})
    with pytest.raises(ResourceExhaustedError):
        fixed.allocate_now(101, CPU)


@pytest.mark.clause("BK-CUPY-22")
def test_the_smallest_run_that_holds_it(small: Make) -> None:
    manager = small(1000, enable_auto_gc=False)
    blocks = [manager.allocate_now(size, CPU) for size in (100, 10, 30, 10, 60, 790)]
    places = {row[0]: row[2] for row in manager.layout(CPU)}
    for hole in (0, 2, 4):
        manager.deallocate_now(blocks[hole])
    found = [manager.allocate_now(size, CPU) for size in (25, 55, 95)]
    after = {row[0]: row[2] for row in manager.layout(CPU)}
    assert [after[handle] for handle in found] == [places[blocks[hole]] for hole in (2, 4, 0)]


@pytest.mark.clause("BK-CUPY-22")
def test_alignment_is_of_the_address(small: Make) -> None:
    manager = small(64 << 10, alignment=16)
    manager.allocate_now(1, CPU)
    for alignment in (1, 64, 512, 4096, 8192):
        handle = manager.allocate_now(5, CPU, alignment)
        address = next(row[2] for row in manager.layout(CPU) if row[0] == handle)
        assert address % max(16, alignment) == 0
        assert manager.handle_info(handle).alignment == max(16, alignment)  # type: ignore[union-attr]
    first = small(8192, alignment=4096)
    first.allocate_now(1, CPU)
    first.allocate_now(1, CPU)  # both fit, though the machine promises only multiples of 512
    assert all(address % 4096 == 0 for _, _, address, _ in first.layout(CPU))
    with pytest.raises(ResourceExhaustedError):
        first.allocate_now(1, CPU)
    for bad in (0, 3, 4 << 20):
        with pytest.raises(InvalidParameterError, match="power of two"):
            asyncio.run(manager.allocate_aligned(1, bad, CPU))
    with pytest.raises(InvalidParameterError, match="size must be >= 1"):
        manager.allocate_now(0, CPU)


@pytest.mark.clause("BK-CUPY-23")
def test_every_crossing_up_and_down_once(small: Make) -> None:
    manager, heard = small(100), []
    manager.set_pressure_callback(heard.append)
    sizes, expected = (69, 1, 14, 1, 9, 1, 5), [0, 1, 1, 2, 2, 3, 3]  # 69 70 84 85 94 95 100
    handles = []
    for size, count in zip(sizes, expected):
        handles.append(manager.allocate_now(size, CPU))
        assert heard == [Medium, High, Critical][:count]
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(1, CPU)
    manager.defragment_now(CPU)
    assert len(heard) == 3
    for handle in reversed(handles[1:]):
        manager.deallocate_now(handle)
    assert heard[3:] == [High, Medium, Low]
    manager.reallocate_now(handles[0], 96)
    manager.reallocate_now(handles[0], 30)
    assert heard[6:] == [Critical, Low]
    manager.configure_pool_now(CPU, MemoryPoolConfig(35, 35, alignment=1))
    assert heard[8:] == [High]


@pytest.mark.clause("BK-CUPY-23")
def test_callbacks_run_outside_the_lock_in_order(small: Make, caplog: pytest.LogCaptureFixture) -> None:
    manager, heard, seen = small(100), [], []
    handles = [manager.allocate_now(20, CPU) for _ in range(2)]

    def callback(level: MemoryPressure) -> None:
        other = threading.Thread(target=lambda: seen.append(manager.memory_info_now(CPU).used_bytes))
        other.start()
        other.join(5)
        heard.append(level)
        if level is Critical:
            for handle in handles:
                manager.deallocate_now(handle)
        if level is Low:
            raise ValueError("on purpose")

    beside: list[MemoryPressure] = []
    manager.set_pressure_callback(lambda level: heard.append(level))  # is replaced
    manager.set_pressure_callback(callback)
    manager.add_pressure_listener(beside.append)
    manager.allocate_now(55, CPU)
    assert heard == beside == [Critical, Medium, Low]
    assert seen == [95, 55, 55]
    assert "on purpose" in caplog.text
    manager.allocate_now(20, CPU)
    assert beside.pop() is Medium
    assert heard.pop() is Medium


@pytest.mark.clause("BK-CUPY-24")
def test_a_borrowed_block_stays(small: Make) -> None:
    manager = small(1000)
    low, kept, high = (manager.allocate_now(100, CPU) for _ in range(3))
    pinned = manager.allocate_now(100, CPU, memory_type=MemoryType.Pinned)
    places = {row[0]: row[2] for row in manager.layout(CPU)}
    manager.deallocate_now(low)
    with manager.borrow(kept) as array:
        array[:3] = [1, 2, 3]
        for call in (lambda: manager.deallocate_now(kept), lambda: manager.reallocate_now(kept, 50)):
            with pytest.raises(InvalidParameterError, match="is borrowed"):
                call()
        stats = manager.defragment_now(CPU)
        after = {row[0]: row[2] for row in manager.layout(CPU)}
        assert (after[kept], after[high], after[pinned]) == (places[kept], places[low], places[pinned])
        assert stats.blocks_moved == 1
    assert manager.read(kept, 4) == b"\1\2\3\0"
    assert manager.defragment_now(CPU).blocks_moved == 0  # high took the only place below kept
    with pytest.raises(ResourceExhaustedError):
        manager.reallocate_now(pinned, 900)
    manager.reallocate_now(kept, 50)
    manager.deallocate_now(kept)


@pytest.mark.clause("BK-CUPY-25")
def test_compaction_joins_regions(small: Make, machine: Machine) -> None:
    manager = small(1000, pool={"initial_size": 100, "growth_increment": 100}, enable_auto_gc=False)
    handles = [manager.allocate_now(50, CPU) for _ in range(8)]
    for number, handle in enumerate(handles):
        manager.fill(handle, number + 1)
    for handle in handles[::2]:
        manager.deallocate_now(handle)
    assert manager.memory_info_now(CPU).fragmentation_ratio == 0.5
    stats = manager.defragment_now(CPU)
    assert (stats.fragmentation_before, stats.fragmentation_after, stats.blocks_moved) == (0.5, 0.0, 4)
    assert stats.memory_freed == 200  # spans of 4 * 100, then 200
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 200
    assert [manager.read(handle) for handle in handles[1::2]] == [bytes([n]) * 50 for n in (2, 4, 6, 8)]
    assert manager.defragment_now(CPU).blocks_moved == 0
    rows = manager.layout(CPU)
    assert [row[2] - rows[0][2] for row in rows] == [0, 50, 100, 150]


@pytest.mark.clause("BK-CUPY-25")
def test_compaction_without_memory_for_both(small: Make, machine: Machine) -> None:
    manager = small(1000, pool={"initial_size": 100, "growth_increment": 100}, enable_auto_gc=False)
    handles = [manager.allocate_now(50, CPU) for _ in range(4)]
    manager.fill(handles[1], 9)
    manager.deallocate_now(handles[0])
    machine.left_bytes = 60
    assert manager.defragment_now(CPU).blocks_moved == 1  # down within its region
    assert manager.read(handles[1]) == bytes([9]) * 50
    machine.left_bytes = 1000
    assert manager.defragment_now(CPU).blocks_moved == 3


@pytest.mark.clause("BK-CUPY-25")
def test_an_allocation_moves_all_others_when_it_must(small: Make) -> None:
    def fill(auto_gc: bool) -> tuple[CupyMemoryManager, list[MemoryHandle]]:
        manager = small(300, pool={"initial_size": 100, "growth_increment": 100}, enable_auto_gc=auto_gc)
        handles = [manager.allocate_now(size, CPU) for size in (60, 60, 60)]
        for number, handle in enumerate(handles):
            manager.fill(handle, number + 1)
        return manager, handles

    manager, handles = fill(auto_gc=True)
    large = manager.allocate_now(120, CPU)  # three free ends of 40
    assert manager.read(large) == bytes(120)
    assert [manager.read(handle) for handle in handles] == [bytes([n]) * 60 for n in (1, 2, 3)]
    with pytest.raises(ResourceExhaustedError):
        fill(auto_gc=False)[0].allocate_now(120, CPU)
    manager, handles = fill(auto_gc=True)
    with manager.borrow(handles[1]), pytest.raises(ResourceExhaustedError, match="120 of 300 bytes free"):
        manager.allocate_now(120, CPU)


@pytest.mark.clause("BK-CUPY-22", "BK-CUPY-25")
def test_configuring_a_pool(small: Make) -> None:
    manager = small(1000, pool={"initial_size": 600})
    handle = manager.allocate_now(300, CPU)
    with pytest.raises(ResourceExhaustedError, match="live blocks reach over 300 bytes, the new limit is 200"):
        manager.configure_pool_now(CPU, MemoryPoolConfig(100, 200, alignment=1))
    for bad in (MemoryPoolConfig(100, 50), MemoryPoolConfig(alignment=3)):
        with pytest.raises(InvalidParameterError):
            manager.configure_pool_now(CPU, bad)
    assert manager.memory_info_now(CPU).total_bytes == 1000
    manager.configure_pool_now(CPU, MemoryPoolConfig(100, 400, alignment=8))
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 400
    assert manager.memory_info_now(CPU).total_bytes == 400
    manager.allocate_now(9, CPU)
    assert manager.memory_info_now(CPU).used_bytes == 316
    manager.configure_pool_now(CPU, MemoryPoolConfig(900, alignment=8))
    assert manager.usage(CPU)[MemoryType.General].committed_bytes == 900
    assert manager.read(handle) == bytes(300)


@pytest.mark.clause("BK-CUPY-20")
def test_pools_by_type_and_the_choice_of_a_device(small: Make) -> None:
    manager = small(1000, pool={"initial_size": 500}, pools={MemoryType.Cache: MemoryPoolConfig(64, 64, alignment=16)})
    manager.allocate_now(50, CPU, memory_type=MemoryType.Cache)
    usage = manager.usage(CPU)[MemoryType.Cache]
    assert (usage.requested_bytes, usage.padding_bytes, usage.free_bytes) == (50, 14, 0)
    with pytest.raises(ResourceExhaustedError):
        manager.allocate_now(1, CPU, memory_type=MemoryType.Cache)
    wish = AllocationRequirements([], MemoryType.Tensor, 64, False, None)
    handle = manager.allocate_for_now(100, wish)
    assert manager.handle_info(handle).memory_type is MemoryType.Tensor  # type: ignore[union-attr]
    with pytest.raises(ResourceExhaustedError, match="no device has 2000 bytes"):
        manager.allocate_for_now(2000, wish)
    info = manager.memory_info_now(CPU)
    assert info.used_bytes + info.free_bytes + info.reserved_bytes == info.total_bytes == 1000
    for bad in ({"gc_threshold": 1.5}, {"max_concurrent_transfers": 0}, {"pool_configs": {}}):
        with pytest.raises(InvalidParameterError, match="MemoryManagerConfig"):
            small(1000, **bad)


@pytest.mark.clause("BK-CUPY-26")
@pytest.mark.parametrize(("distance", "size"), [(1, 5000), (700, 5000), (4096, 5000), (3, 2), (0, 50), (5000, 5000)])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_overlapping_ranges_are_memmove(small: Make, distance: int, size: int, up: bool, queued: bool) -> None:
    manager = small(20_000)
    data = np.random.default_rng(3).bytes(12_000)
    handle = manager.allocate_now(12_000, CPU)
    manager.write(handle, data)
    start, to = (100, 100 + distance) if up else (100 + distance, 100)
    stream = manager.streams.create_stream_now(CPU) if queued else None
    manager.copy_async_now(MemoryTransfer(handle, handle, size, start, to), stream)
    if stream is not None:
        manager.streams.synchronize_now(stream)
    assert manager.read(handle) == data[:to] + data[start : start + size] + data[to + size :]


@pytest.mark.clause("BK-CUPY-26")
@pytest.mark.parametrize("distance", [5, BOUNCE_BYTES + 5])
@pytest.mark.parametrize("up", [True, False])
def test_overlapping_ranges_in_several_pieces(small: Make, distance: int, up: bool) -> None:
    size = 3 * BOUNCE_BYTES + 77
    manager = CupyMemoryManager(Machine(), 1 << 26, MemoryManagerConfig({MemoryType.General: MemoryPoolConfig(0)}))
    data = np.random.default_rng(4).bytes(size + distance)
    handle = manager.allocate_now(len(data), CPU)
    manager.write(handle, data)
    start, to = (0, distance) if up else (distance, 0)
    manager.copy_now(MemoryTransfer(handle, handle, size, start, to))
    assert manager.read(handle) == data[:to] + data[start : start + size] + data[to + size :]


@pytest.mark.clause("BK-CUPY-26")
@pytest.mark.parametrize("to", [20, 26])
def test_overlapping_ranges_on_a_full_device(small: Make, machine: Machine, to: int) -> None:
    manager = small(1000)
    handle = manager.allocate_now(100, CPU)
    manager.write(handle, bytes(range(100)))
    machine.left_bytes = 0
    manager.copy_now(MemoryTransfer(handle, handle, 50, 23, to))
    assert manager.read(handle)[to : to + 50] == bytes(range(23, 73))


@pytest.mark.clause("BK-CUPY-26")
def test_the_host_refuses_what_a_gpu_leaves_undefined(machine: Machine) -> None:
    array = machine.allocate_bytes(100)
    with pytest.raises(BackendError, match="source and target overlap"):
        machine.copy_bytes(array[:60], array[40:], None)


@pytest.mark.clause("BK-CUPY-20")
def test_host_data_and_ranges(small: Make) -> None:
    manager = small(1000)
    one, two = (manager.allocate_now(100, CPU) for _ in range(2))
    manager.write(one, np.arange(20, dtype=np.float32), 8)
    assert manager.read(one, 80, 8) == np.arange(20, dtype=np.float32).tobytes()
    manager.fill(one, 255, 4, 96)
    assert manager.read(one, offset=94) == b"\0\0\xff\xff\xff\xff"
    asyncio.run(manager.copy(one, two, 80, 8, 20))
    assert manager.read(two) == bytes(20) + manager.read(one, 80, 8)
    before = manager.read(one), manager.read(two)
    bad: list[Callable[[], Any]] = [
        lambda: manager.write(one, bytes(101)),
        lambda: manager.write(one, b"ab", 99),
        lambda: manager.read(one, 1, 100),
        lambda: manager.fill(one, 256),
        lambda: manager.fill(one, 1, 101),
        lambda: manager.copy_now(MemoryTransfer(one, two, 50, 51, 0)),
        lambda: manager.copy_now(MemoryTransfer(one, two, 0, 0, 101)),
        lambda: manager.write(one, np.zeros((4, 4))[:, ::2]),
    ]
    for call in bad:
        with pytest.raises(InvalidParameterError):
            call()
    assert (manager.read(one), manager.read(two)) == before


@pytest.mark.clause("BK-CUPY-20")
def test_a_stray_write_is_found(small: Make) -> None:
    manager = small(1000)
    keep, gone = (manager.allocate_now(100, CPU) for _ in range(2))
    with manager.borrow(gone) as array:
        pass
    manager.deallocate_now(gone)
    manager.check_invariants()
    array[50] = 0
    with pytest.raises(InternalError, match="were written by somebody"):
        manager.check_invariants()
    assert manager.read(keep) == bytes(100)


@pytest.mark.clause("BK-CUPY-20")
def test_many_threads(small: Make) -> None:
    manager = small(4000, enable_debug=False)
    faults: list[str] = []

    def live(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            handle = manager.allocate_now(int(rng.integers(1, 200)), CPU)
            manager.fill(handle, seed)
            if rng.random() < 0.2:
                manager.defragment_now(CPU)
            if set(manager.read(handle)) != {seed}:
                faults.append(f"thread {seed}")
            manager.deallocate_now(handle)

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    manager.check_invariants()
    assert manager.memory_info_now(CPU).used_bytes == 0
