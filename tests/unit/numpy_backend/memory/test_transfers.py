"""Copies between allocations and devices, to and from the host, and queued on streams."""

from __future__ import annotations

import asyncio
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumError, InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.memory import MemoryHandle, MemoryTransfer, StreamHandle
from ferrum_ref.numpy_backend.memory import NumpyMemoryManager
from ferrum_ref.types.devices import Device

CPU, CUDA = Device.CPU, Device.CUDA(0)


@pytest.mark.clause("ME-COPY-1", "ME-HOST-1")
def test_bytes_travel_between_devices(small: Any) -> None:
    manager = small(peers={CUDA: 4096})
    host, device, back = (manager.allocate_now(100, where) for where in (CPU, CUDA, CPU))
    text = bytes(range(100))
    manager.write(host, text)
    asyncio.run(manager.copy(host, device, 60, 10, 20))
    assert manager.read(device) == bytes(20) + text[10:70] + bytes(20)
    asyncio.run(manager.copy(device, back, 100, 0, 0))
    assert manager.read(back) == manager.read(device)
    assert manager.read(host) == text


@pytest.mark.clause("ME-COPY-1")
@given(src=st.integers(0, 40), dst=st.integers(0, 40), size=st.integers(0, 24))
def test_overlap_is_memmove(src: int, dst: int, size: int) -> None:
    manager = NumpyMemoryManager(capacity_bytes=256)
    handle = manager.allocate_now(64, CPU)
    model = bytearray(range(64))
    manager.write(handle, bytes(model))
    manager.copy_now(MemoryTransfer(handle, handle, size, src, dst))
    model[dst : dst + size] = bytes(model[src : src + size])
    assert manager.read(handle) == bytes(model)


@pytest.mark.clause("ME-COPY-2")
@pytest.mark.parametrize(
    ("size", "src_offset", "dst_offset"), [(11, 0, 0), (1, 10, 0), (1, 0, 20), (5, 0, 16), (0, 11, 0)]
)
def test_ranges_must_fit(small: Any, size: int, src_offset: int, dst_offset: int) -> None:
    manager = small()
    src, dst = manager.allocate_now(10, CPU), manager.allocate_now(20, CPU)
    manager.fill(src, 1)
    transfer = MemoryTransfer(src, dst, size, src_offset, dst_offset)
    stream = manager.streams.create_stream_now(CPU)
    with pytest.raises(InvalidParameterError, match="range"):
        manager.copy_now(transfer)
    for where in (None, stream):
        with pytest.raises(InvalidParameterError, match="range"):
            asyncio.run(manager.copy_async(transfer, where))
    manager.streams.synchronize_now(stream)
    assert manager.read(dst) == bytes(20)
    manager.copy_now(MemoryTransfer(src, dst, 0, 10, 20))


@pytest.mark.clause("ME-HOST-1")
def test_host_data_is_taken_as_its_bytes(small: Any) -> None:
    manager = small()
    handle = manager.allocate_now(24, CPU)
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    for data in (numbers, numbers.tobytes(), bytearray(numbers.tobytes()), memoryview(numbers.tobytes())):
        manager.fill(handle, 0)
        manager.write(handle, data)
        assert np.array_equal(np.frombuffer(manager.read(handle), np.float32), numbers.ravel())
    manager.write(handle, np.array([1.0], ml_dtypes.bfloat16), 22)
    assert manager.read(handle, 2, 22) == b"\x80\x3f"
    manager.write(handle, b"", 24)
    assert manager.read(handle, offset=22) == b"\x80\x3f"
    assert manager.read(handle, offset=24) == b""


@pytest.mark.clause("ME-HOST-1", "ME-HOST-2")
def test_host_transfers_that_do_not_fit(small: Any) -> None:
    manager = small()
    handle = manager.allocate_now(10, CPU)
    bad: list[Any] = [
        lambda: manager.write(handle, b"12345678901"),
        lambda: manager.write(handle, b"1", 10),
        lambda: manager.write(handle, b"1", -1),
        lambda: manager.write(handle, np.zeros((4, 4), np.uint8)[:, 1]),
        lambda: manager.write(handle, memoryview(bytes(8))[::2]),
        lambda: manager.write(handle, np.array([None])),
        lambda: manager.write(handle, 5),
        lambda: manager.read(handle, 11),
        lambda: manager.read(handle, 1, 10),
        lambda: manager.read(handle, None, 11),
        lambda: manager.read(handle, -1),
        lambda: manager.fill(handle, 256),
        lambda: manager.fill(handle, -1),
        lambda: manager.fill(handle, 1, 11),
    ]
    for call in bad:
        with pytest.raises(InvalidParameterError):
            call()
    assert manager.read(handle) == bytes(10)


@pytest.mark.clause("ME-HOST-2")
def test_fill(small: Any) -> None:
    manager = small()
    handle = manager.allocate_now(10, CPU)
    manager.fill(handle, 7, 3, 2)
    assert manager.read(handle) == bytes([0, 0, 7, 7, 7, 0, 0, 0, 0, 0])
    manager.fill(handle, 255, offset=8)
    assert manager.read(handle) == bytes([0, 0, 7, 7, 7, 0, 0, 0, 255, 255])


class Queued:
    """Two allocations of 8 bytes and a stream."""

    def __init__(self, manager: NumpyMemoryManager) -> None:
        self.manager, self.streams = manager, manager.streams
        self.src, self.dst = manager.allocate_now(8, CPU), manager.allocate_now(8, CPU)
        self.stream = self.streams.create_stream_now(CPU)
        manager.fill(self.src, 1)

    def queue(self, dst: MemoryHandle | None = None) -> None:
        transfer = MemoryTransfer.new(self.src, dst or self.dst, 8)
        asyncio.run(self.manager.copy_async(transfer, self.stream))


@pytest.mark.clause("ME-COPY-3")
@pytest.mark.parametrize("stream", [None, StreamHandle.default()])
def test_without_a_stream_the_copy_is_done(small: Any, stream: StreamHandle | None) -> None:
    q = Queued(small())
    asyncio.run(q.manager.copy_async(MemoryTransfer.new(q.src, q.dst, 8), stream))
    assert q.manager.read(q.dst) == b"\1" * 8


@pytest.mark.clause("ME-COPY-3", "ME-COPY-4")
def test_a_queued_copy_reads_when_it_runs(small: Any) -> None:
    q = Queued(small())
    q.queue()
    assert q.manager.read(q.dst) == bytes(8)
    q.manager.fill(q.src, 2)
    q.streams.synchronize_now(q.stream)
    assert q.manager.read(q.dst) == b"\2" * 8
    with pytest.raises(NotFoundError, match="stream 99"):
        asyncio.run(q.manager.copy_async(MemoryTransfer.new(q.src, q.dst, 8), StreamHandle(99)))


@pytest.mark.clause("ME-COPY-4")
def test_a_queued_copy_finds_moved_blocks(small: Any) -> None:
    manager = small()
    gap = manager.allocate_now(64, CPU)
    q = Queued(manager)
    q.queue()
    manager.deallocate_now(gap)
    assert manager.defragment_now(CPU).blocks_moved == 2
    q.streams.synchronize_now(q.stream)
    assert manager.read(q.dst) == b"\1" * 8


@pytest.mark.clause("ME-COPY-5")
@pytest.mark.parametrize("spoil", ["free", "shrink"])
def test_a_queued_copy_may_fail(small: Any, spoil: str) -> None:
    q = Queued(small())
    q.queue()
    if spoil == "free":
        q.manager.deallocate_now(q.src)
    else:
        q.manager.reallocate_now(q.src, 7)
    expected: type[FerrumError] = NotFoundError if spoil == "free" else InvalidParameterError
    with pytest.raises(expected, match="copy: src"):
        q.streams.synchronize_now(q.stream)
    assert q.manager.read(q.dst) == bytes(8)
    q.streams.synchronize_now(q.stream)


@pytest.mark.clause("ME-COPY-6")
def test_the_number_of_queued_copies_is_limited(small: Any) -> None:
    q = Queued(small(config={"max_concurrent_transfers": 2}))
    targets = [q.manager.allocate_now(8, CPU) for _ in range(4)]
    done = []
    for target in targets:
        q.queue(target)
        done.append([q.manager.read(one)[0] for one in targets])
    assert done == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    q.streams.synchronize_now(q.stream)
    q.manager.fill(q.src, 9)
    q.queue(targets[0])  # finished copies do not count
    assert q.manager.read(targets[0])[0] == 1


@pytest.mark.clause("ME-INFO-3")
def test_bandwidth_is_measured(small: Any, clock: Any) -> None:
    manager = small(peers={CUDA: 4096})
    a, b, far = manager.allocate_now(1000, CPU), manager.allocate_now(1000, CPU), manager.allocate_now(1000, CUDA)
    assert manager.memory_info_now(CPU).bandwidth_gbps is None
    clock.step_s = 1e-6
    manager.copy_now(MemoryTransfer.new(a, b, 1000))  # 1000 bytes in a microsecond: 1 GB/s
    assert manager.memory_info_now(CPU).bandwidth_gbps == pytest.approx(1.0)
    assert manager.memory_info_now(CUDA).bandwidth_gbps is None
    manager.copy_now(MemoryTransfer.new(a, far, 500))
    assert manager.memory_info_now(CUDA).bandwidth_gbps == pytest.approx(0.5)
    assert manager.memory_info_now(CPU).bandwidth_gbps == pytest.approx(0.75)


@pytest.mark.clause("ME-INFO-3")
def test_bandwidth_needs_statistics(small: Any, clock: Any) -> None:
    manager = small(pool={"enable_stats": False})
    clock.step_s = 1e-6
    handle = manager.allocate_now(8, CPU)
    manager.copy_now(MemoryTransfer.new(handle, handle, 8))
    assert manager.memory_info_now(CPU).bandwidth_gbps is None
