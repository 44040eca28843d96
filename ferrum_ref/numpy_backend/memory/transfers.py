"""Bytes in motion: copies between allocations, to and from the host, fills, and copies queued on streams.

Clauses: ME-COPY-1..6, ME-HOST-1..2, ME-ACCESS-1 (specs/memory.md).
"""

from __future__ import annotations

from collections import deque
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.memory import MemoryHandle, MemoryTransfer, StreamHandle
from ferrum_ref.numpy_backend.memory.state import Allocation, MemoryState
from ferrum_ref.numpy_backend.memory.streams import NumpyStreamManager, Ticket
from ferrum_ref.types.record import check_unsigned

HostData: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]


class Transfers:
    """Copies of one manager; at most `max_concurrent_transfers` queued ones at a time."""

    def __init__(self, state: MemoryState, streams: NumpyStreamManager) -> None:
        self._state, self._streams = state, streams
        self._in_flight: deque[Ticket] = deque()

    def copy(self, transfer: MemoryTransfer) -> None:
        """Now.  [ME-COPY-1..2]"""
        state, size = self._state, transfer.size
        with state.lock:
            src, dst = self._checked(transfer)
            began_s = state.clock()
            dst.bytes(transfer.dst_offset, size)[:] = src.bytes(transfer.src_offset, size)
            now_s = state.clock()
            src.home.count_copy(size, now_s - began_s)
            if dst.home is not src.home:
                dst.home.count_copy(size, now_s - began_s)
            _note_read(src, transfer.src_offset, size, now_s)
            _note_write(dst, transfer.dst_offset, size, now_s)

    def queue(self, transfer: MemoryTransfer, stream: StreamHandle) -> None:
        """On a stream; checked now and again when it runs.  [ME-COPY-3..5]"""
        with self._state.lock:
            self._checked(transfer)
        with self._streams.lock:
            self._streams.require(stream, "copy_async")
            self._in_flight = deque(ticket for ticket in self._in_flight if self._streams.is_pending(ticket))
            while stream.value and len(self._in_flight) >= self._state.config.max_concurrent_transfers:
                self._streams.run_until_done(self._in_flight.popleft())
            self._in_flight.append(self._streams.submit(stream, lambda: self.copy(transfer)))

    def write(self, handle: MemoryHandle, data: HostData, offset: int) -> None:
        """Host to device.  [ME-HOST-1]"""
        source = host_bytes(data, "write")
        with self._state.lock:
            allocation = self._state.handles.get(handle, "write")
            allocation.check_range("write", offset, source.size)
            allocation.bytes(offset, source.size)[:] = source
            _note_write(allocation, offset, source.size, self._state.clock())

    def read(self, handle: MemoryHandle, size: int | None, offset: int) -> bytes:
        """Device to host.  [ME-HOST-1]"""
        with self._state.lock:
            allocation = self._state.handles.get(handle, "read")
            num_bytes = max(0, allocation.block.size - offset) if size is None else size
            allocation.check_range("read", offset, num_bytes)
            data = allocation.bytes(offset, num_bytes).tobytes()
            _note_read(allocation, offset, num_bytes, self._state.clock())
            return data

    def fill(self, handle: MemoryHandle, value: int, size: int | None, offset: int) -> None:
        """memset.  [ME-HOST-2]"""
        check_unsigned(value, 256, "fill", "value")
        with self._state.lock:
            allocation = self._state.handles.get(handle, "fill")
            num_bytes = max(0, allocation.block.size - offset) if size is None else size
            allocation.check_range("fill", offset, num_bytes)
            allocation.bytes(offset, num_bytes).fill(value)
            _note_write(allocation, offset, num_bytes, self._state.clock())

    def _checked(self, transfer: MemoryTransfer) -> tuple[Allocation, Allocation]:
        src = self._state.handles.get(transfer.src, "copy: src")
        dst = self._state.handles.get(transfer.dst, "copy: dst")
        src.check_range("copy: src", transfer.src_offset, transfer.size)
        dst.check_range("copy: dst", transfer.dst_offset, transfer.size)
        return src, dst


def host_bytes(data: HostData, operation: str) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous buffer, not copied. Pure.  Raises InvalidParameterError for anything else."""
    try:
        array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8) if len(data) else np.empty(0)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidParameterError(f"{operation}: expected a C-contiguous buffer of bytes, {error}") from None
    if not array.flags.c_contiguous or array.dtype.hasobject:
        raise InvalidParameterError(f"{operation}: expected a C-contiguous array of numbers, got {array.dtype} strided")
    return array.reshape(-1).view(np.uint8)


def _note_read(allocation: Allocation, offset: int, size: int, now_s: float) -> None:
    if allocation.block.log is not None:
        allocation.block.log.read(offset, size, now_s)


def _note_write(allocation: Allocation, offset: int, size: int, now_s: float) -> None:
    if allocation.block.log is not None:
        allocation.block.log.write(offset, size, now_s)
