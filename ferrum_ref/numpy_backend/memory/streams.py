"""Queues of work that runs when someone waits for it, and the events that order it.

One engine runs one operation at a time. Without a random generator it always runs the oldest operation that may run;
with one it draws among the streams, so that every interleaving the contract allows can occur, repeatably.
Clauses: ME-STREAM-1..8, ME-EVENT-1..4 (specs/memory.md).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NewType

import numpy as np

from ferrum_ref.errors import FerrumError, InternalError, InvalidParameterError, NotFoundError
from ferrum_ref.interfaces.memory import EventHandle, StreamHandle, StreamManager
from ferrum_ref.types.devices import Device

Ticket = NewType("Ticket", int)


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in a queue: work to run, an event to complete, or an event to wait for."""

    ticket: Ticket
    work: Callable[[], None] | None = None
    completes: int | None = None
    awaits: int | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """A queue, and the failure that nobody has heard of yet; mutable."""

    id: int
    device: Device | None
    queue: deque[Entry] = field(default_factory=deque)
    error: FerrumError | None = None


class NumpyStreamManager(StreamManager):
    """Streams and events; `rng` draws the interleaving.  [ME-STREAM-1..8, ME-EVENT-1..4]"""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self.lock = threading.RLock()
        self._rng = rng
        self._streams = {0: Stream(0, None)}
        self._next_stream = self._next_event = 1
        self._next_ticket = 0
        self._pending: set[Ticket] = set()
        self._open_events: set[int] = set()
        self._failed_events: dict[int, FerrumError] = {}
        self._is_running = False

    # The synchronous core.
    def create_stream_now(self, device: Device) -> StreamHandle:
        """See `StreamManager.create_stream`."""
        with self.lock:
            stream = Stream(self._next_stream, device)
            self._next_stream += 1
            self._streams[stream.id] = stream
            return StreamHandle(stream.id)

    def submit(self, stream: StreamHandle, work: Callable[[], None]) -> Ticket:
        """Queue any work; on stream 0 it is done on return. `work` must not call this manager.  [ME-STREAM-2..3]

        Raises NotFoundError: unknown stream; on stream 0 whatever the work raises.
        """
        with self.lock:
            return self._append(stream, "submit", work=work)

    def synchronize_now(self, stream: StreamHandle) -> None:
        """See `StreamManager.synchronize_stream`."""
        with self.lock:
            queue = self.require(stream, "synchronize_stream")
            self._run_while(lambda: bool(queue.queue))
            self._surface(queue)

    def destroy_stream_now(self, stream: StreamHandle) -> None:
        """See `StreamManager.destroy_stream`."""
        with self.lock:
            queue = self.require(stream, "destroy_stream")
            if queue.id == 0:
                raise InvalidParameterError("destroy_stream: the default stream 0 lives as long as its manager")
            self._run_while(lambda: bool(queue.queue))
            del self._streams[queue.id]
            self._surface(queue)

    def is_ready_now(self, stream: StreamHandle) -> bool:
        """See `StreamManager.is_stream_ready`."""
        with self.lock:
            queue = self.require(stream, "is_stream_ready")
            if any(other.queue for other in self._streams.values()):
                self._run_one()
            return not queue.queue

    def record_event_now(self, stream: StreamHandle) -> EventHandle:
        """See `StreamManager.record_event`."""
        with self.lock:
            self.require(stream, "record_event")
            event, self._next_event = self._next_event, self._next_event + 1
            self._open_events.add(event)
            self._append(stream, "record_event", completes=event)
            return EventHandle(event)

    def wait_event_now(self, stream: StreamHandle, event: EventHandle) -> None:
        """See `StreamManager.wait_event`."""
        with self.lock:
            self.require(stream, "wait_event")
            if not 1 <= event.value < self._next_event:
                raise NotFoundError(f"wait_event: event {event.value} was never recorded here; record_event gives one")
            self._append(stream, "wait_event", awaits=event.value)

    def is_pending(self, ticket: Ticket) -> bool:
        """The submitted work has not run yet. Pure."""
        with self.lock:
            return ticket in self._pending

    def run_until_done(self, ticket: Ticket) -> None:
        """Run until that work is done."""
        with self.lock:
            self._run_while(lambda: ticket in self._pending)

    # The contract.
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

    # The engine.
    def require(self, stream: StreamHandle, operation: str) -> Stream:
        """The queue. Pure.  Raises NotFoundError; InvalidParameterError from inside a stream's work."""
        if self._is_running:
            raise InvalidParameterError(f"{operation}: called from inside a stream's work; queue it from outside")
        found = self._streams.get(stream.value)
        if found is None:
            raise NotFoundError(f"{operation}: stream {stream.value} does not exist or was destroyed")
        return found

    def _append(
        self,
        stream: StreamHandle,
        operation: str,
        work: Callable[[], None] | None = None,
        completes: int | None = None,
        awaits: int | None = None,
    ) -> Ticket:
        queue = self.require(stream, operation)
        ticket = Ticket(self._next_ticket)
        self._next_ticket += 1
        if work is not None:
            self._pending.add(ticket)
        queue.queue.append(Entry(ticket, work, completes, awaits))
        self._settle()
        while queue.id == 0 and queue.queue:
            if queue.queue[0].work is not None:
                self._run(queue)
            else:
                self._run_one()
        if queue.id == 0:
            self._surface(queue)
        return ticket

    def _run_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            self._run_one()

    def _run_one(self) -> None:
        """Run the work at the head of one stream; after _settle a head is work or an event still open."""
        ready = [stream for stream in self._streams.values() if stream.queue and stream.queue[0].work is not None]
        if not ready:
            raise InternalError("streams: work is queued but every stream waits; an event cannot wait for itself")
        if self._rng is None:
            self._run(min(ready, key=lambda stream: stream.queue[0].ticket))
        else:
            self._run(ready[int(self._rng.integers(len(ready)))])

    def _run(self, stream: Stream) -> None:
        """Run the work at the head of this stream."""
        entry = stream.queue[0]
        self._is_running = True
        try:
            if entry.work is not None:
                entry.work()
        except Exception as error:  # noqa: BLE001  kept, and raised where the stream is synchronised
            stream.error = FerrumError.from_value(error)
        finally:
            self._is_running = False
            stream.queue.popleft()
            self._pending.discard(entry.ticket)
            self._settle()

    def _settle(self) -> None:
        """Take from every head what takes no time: events, satisfied waits, and all that follows a failure."""
        changed = True
        while changed:
            changed = False
            for stream in self._streams.values():
                while stream.queue and self._passes(stream, stream.queue[0]):
                    self._pending.discard(stream.queue.popleft().ticket)
                    changed = True

    def _passes(self, stream: Stream, entry: Entry) -> bool:
        if entry.completes is not None:
            self._open_events.discard(entry.completes)
            if stream.error is not None:
                self._failed_events[entry.completes] = stream.error
            return True
        if stream.error is not None:
            return True
        if entry.awaits is None or entry.awaits in self._open_events:
            return False
        cause = self._failed_events.get(entry.awaits)
        if cause is not None:
            stream.error = type(cause)(
                f"stream {stream.id} awaited event {entry.awaits}, which failed: {cause.message}"
            )
        return True

    def _surface(self, stream: Stream) -> None:
        error, stream.error = stream.error, None
        if error is not None:
            raise error
