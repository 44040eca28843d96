"""Bytes in motion: copies between allocations, to and from the host, fills, copies queued on streams.

Clauses: BK-CUPY-26..27 (specs/backend_cupy.md), ME-COPY-1..6, ME-HOST-1..2 (specs/memory.md).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_cupy.machine import DeviceArray, DeviceEvent, DeviceStream, Machine
from ferrum_cupy.memory_device import DeviceMemory
from ferrum_cupy.memory_handles import HandleTable, check_range
from ferrum_cupy.memory_moves import move_bytes
from ferrum_cupy.memory_region import Block
from ferrum_cupy.memory_streams import CupyStreamManager
from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.memory import MemoryHandle, MemoryTransfer, StreamHandle
from ferrum_ref.types.record import check_unsigned

HostData: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]


class Transfers:
    """Copies of one manager, under its lock; at most `max_in_flight` queued ones at a time.  [ME-COPY-6]"""

    def __init__(
        self,
        machine: Machine,
        memory: DeviceMemory,
        handles: HandleTable,
        streams: CupyStreamManager,
        lock: threading.RLock,
        clock: Callable[[], float],
        max_in_flight: int,
    ) -> None:
        self._machine, self._memory, self._handles, self._streams = machine, memory, handles, streams
        self._lock, self._clock, self._max_in_flight = lock, clock, max_in_flight
        self._in_flight: deque[tuple[DeviceEvent, DeviceArray | None]] = deque()  # with the buffer each still needs

    def copy(self, transfer: MemoryTransfer) -> None:
        """Now.  [ME-COPY-1..2]"""
        with self._lock:
            src, dst = self._checked(transfer)
            began_s = self._clock()
            self._move(src, dst, transfer, None)
            self._memory.count_copy(transfer.size, self._clock() - began_s)

    def queue(self, transfer: MemoryTransfer, stream: StreamHandle) -> None:
        """On a stream; handed to the device at once.  [ME-COPY-3, BK-CUPY-27]"""
        with self._lock:
            src, dst = self._checked(transfer)
            queue = self._streams.require(stream, "copy_async")
            if queue is None:
                self.copy(transfer)
                return
            self._in_flight = deque(entry for entry in self._in_flight if not entry[0].is_done)
            while len(self._in_flight) >= self._max_in_flight:
                self._in_flight.popleft()[0].synchronize()
            bounce = self._move(src, dst, transfer, queue)
            event = queue.record()
            self._in_flight.append((event, bounce))
            for block in {src, dst}:
                block.await_later(event)

    def write(self, handle: MemoryHandle, data: HostData, offset: int) -> None:
        """Host to device.  [ME-HOST-1]"""
        source = host_bytes(data, "write")
        with self._lock:
            block = self._handles.get(handle, "write")
            check_range("write", block, offset, source.size)
            if source.size:
                self._machine.write_bytes(_view(block, offset, source.size), source)

    def read(self, handle: MemoryHandle, size: int | None, offset: int) -> bytes:
        """Device to host.  [ME-HOST-1]"""
        with self._lock:
            block = self._handles.get(handle, "read")
            num_bytes = max(0, block.size - offset) if size is None else size
            check_range("read", block, offset, num_bytes)
            data: bytes = self._machine.to_host(_view(block, offset, num_bytes)).tobytes() if num_bytes else b""
            return data

    def fill(self, handle: MemoryHandle, value: int, size: int | None, offset: int) -> None:
        """memset.  [ME-HOST-2]"""
        check_unsigned(value, 256, "fill", "value")
        with self._lock:
            block = self._handles.get(handle, "fill")
            num_bytes = max(0, block.size - offset) if size is None else size
            check_range("fill", block, offset, num_bytes)
            if num_bytes:
                self._machine.fill_bytes(_view(block, offset, num_bytes), value)

    def _checked(self, transfer: MemoryTransfer) -> tuple[Block, Block]:
        src = self._handles.get(transfer.src, "copy: src")
        dst = self._handles.get(transfer.dst, "copy: dst")
        check_range("copy: src", src, transfer.src_offset, transfer.size)
        check_range("copy: dst", dst, transfer.dst_offset, transfer.size)
        return src, dst

    def _move(self, src: Block, dst: Block, transfer: MemoryTransfer, queue: DeviceStream | None) -> DeviceArray | None:
        target, source = (_view(block, 0, block.size) for block in (dst, src))
        to, start, size = transfer.dst_offset, transfer.src_offset, transfer.size
        return move_bytes(self._machine, target, to, source, start, size, queue)


def host_bytes(data: HostData, operation: str) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous buffer, not copied. Pure.  Raises InvalidParameterError for anything else."""
    try:
        array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8) if len(data) else np.empty(0)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidParameterError(f"{operation}: expected a C-contiguous buffer of bytes, {error}") from None
    if not array.flags.c_contiguous or array.dtype.hasobject:
        raise InvalidParameterError(f"{operation}: expected a C-contiguous array of numbers, got {array.dtype} strided")
    return array.reshape(-1).view(np.uint8)


def _view(block: Block, offset: int, size: int) -> DeviceArray:
    return block.region.view(block.offset + offset, block.offset + offset + size)
