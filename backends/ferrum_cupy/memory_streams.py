"""Streams and events of one device.  Clauses: BK-CUPY-27..28 (specs/backend_cupy.md), ME-STREAM-*, ME-EVENT-*."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ferrum_cupy.machine import DeviceEvent, DeviceStream, Machine
from ferrum_ref.errors import InvalidParameterError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.memory import EventHandle, StreamHandle, StreamManager
from ferrum_ref.types.devices import Device


def no_check(operation: str) -> None:
    """Always open."""


class CupyStreamManager(StreamManager):
    """The device runs what is queued on its own; stream 0 is done before a call returns.

    `check_open(operation)` raises when there is nothing to work with any more.
    """

    def __init__(self, machine: Machine, check_open: Callable[[str], None] = no_check) -> None:
        self._machine, self._check_open = machine, check_open
        self._lock = threading.RLock()
        self._streams: dict[int, DeviceStream | None] = {0: None}
        self._events: dict[int, DeviceEvent] = {}  # those that may not be done yet
        self._next_stream = self._next_event = 1

    def create_stream_now(self, device: Device) -> StreamHandle:
        """See `StreamManager.create_stream`.  Raises UnsupportedError for another device."""
        self._check_open("create_stream")
        if device != self._machine.device:
            raise UnsupportedError(f"create_stream: no device {device} here; there is {self._machine.device}")
        with self._lock:
            handle, self._next_stream = self._next_stream, self._next_stream + 1
            self._streams[handle] = self._machine.new_stream()
            return StreamHandle(handle)

    def destroy_stream_now(self, stream: StreamHandle) -> None:
        """See `StreamManager.destroy_stream`."""
        found = self.require(stream, "destroy_stream")
        if found is None:
            raise InvalidParameterError("destroy_stream: the default stream 0 lives as long as its manager")
        try:
            found.synchronize()
        finally:
            with self._lock:
                self._streams.pop(stream.value, None)

    def synchronize_now(self, stream: StreamHandle) -> None:
        """See `StreamManager.synchronize_stream`."""
        found = self.require(stream, "synchronize_stream")
        if found is not None:
            found.synchronize()

    def is_ready_now(self, stream: StreamHandle) -> bool:
        """See `StreamManager.is_stream_ready`."""
        found = self.require(stream, "is_stream_ready")
        return found is None or found.poll()

    def record_event_now(self, stream: StreamHandle) -> EventHandle:
        """See `StreamManager.record_event`."""
        with self._lock:
            found = self.require(stream, "record_event")
            self._events = {event: point for event, point in self._events.items() if not point.is_done}
            event, self._next_event = self._next_event, self._next_event + 1
            if found is not None:
                self._events[event] = found.record()
            return EventHandle(event)

    def wait_event_now(self, stream: StreamHandle, event: EventHandle) -> None:
        """See `StreamManager.wait_event`; on stream 0 it returns when the event is complete."""
        with self._lock:
            found = self.require(stream, "wait_event")
            if not 1 <= event.value < self._next_event:
                raise NotFoundError(f"wait_event: event {event.value} was never recorded here; record_event gives one")
            point = self._events.get(event.value)
        if point is not None and found is None:
            point.synchronize()
        elif point is not None and found is not None:
            found.wait(point)

    def require(self, stream: StreamHandle, operation: str) -> DeviceStream | None:
        """The device's stream, None for stream 0. Pure.  Raises NotFoundError."""
        self._check_open(operation)
        with self._lock:
            if stream.value not in self._streams:
                raise NotFoundError(f"{operation}: stream {stream.value} does not exist or was destroyed")
            return self._streams[stream.value]

    async def create_stream(self, device: Device) -> StreamHandle:
        return self.create_stream_now(device)

    async def destroy_stream(self, stream: StreamHandle) -> None:
        self.destroy_stream_now(stream)

    async def synchronize_stream(self, stream: StreamHandle) -> None:
        self.synchronize_now(stream)

    async def is_stream_ready(self, stream: StreamHandle) -> bool:
        return self.is_ready_now(stream)

    def default_stream(self, device: Device) -> StreamHandle:
        return StreamHandle.default()

    async def record_event(self, stream: StreamHandle) -> EventHandle:
        return self.record_event_now(stream)

    async def wait_event(self, stream: StreamHandle, event: EventHandle) -> None:
        self.wait_event_now(stream, event)
