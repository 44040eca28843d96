"""Streams without a device: what is queued runs when somebody waits for it, as late as a GPU may run it.

So an operation that forgets to wait shows every time. With a random generator the stream that goes next is drawn.
Clauses: BK-CUPY-28 (specs/backend_cupy.md).
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable

from ferrum_cupy.machine import DeviceEvent, DeviceStream
from ferrum_ref.errors import BackendError


class HostQueue:
    """All streams of one machine that have something to run; one operation at a time."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.rng = rng
        self.lock = threading.RLock()
        self._busy: list[HostStream] = []
        self._num_submitted = 0

    def add(self, stream: HostStream, entry: Callable[[], None] | HostEvent, *, waits: bool = False) -> None:
        """Queue work, the completion of an event, or the wait for one."""
        with self.lock:
            self._num_submitted += 1
            stream.entries.append((self._num_submitted, entry, waits))
            if stream not in self._busy:
                self._busy.append(stream)
            self._settle()

    def run_one(self) -> None:
        """The oldest work that may run, or the head of a stream drawn at random."""
        with self.lock:
            ready = [stream for stream in self._busy if not isinstance(stream.entries[0][1], HostEvent)]
            if not ready:
                raise BackendError("streams: every stream waits for another; an event is recorded before it is awaited")
            stream = self.rng.choice(ready) if self.rng else min(ready, key=lambda stream: stream.entries[0][0])
            work = stream.entries.popleft()[1]
            if not isinstance(work, HostEvent):
                work()
            self._settle()

    def run_while(self, condition: Callable[[], bool]) -> None:
        with self.lock:
            while condition():
                self.run_one()

    def run_all(self) -> None:
        self.run_while(lambda: bool(self._busy))

    def _settle(self) -> None:
        """Take away what takes no time: events that are reached, waits for events that are done."""
        changed = True
        while changed:
            changed = False
            for stream in self._busy:
                while stream.entries:
                    _, event, waits = stream.entries[0]
                    if not isinstance(event, HostEvent) or (waits and not event.is_done):
                        break
                    event.is_reached = event.is_reached or not waits
                    stream.entries.popleft()
                    changed = True
        self._busy = [stream for stream in self._busy if stream.entries]


class HostEvent(DeviceEvent):
    """Reached when its stream got there."""

    def __init__(self, queue: HostQueue) -> None:
        self._queue = queue
        self.is_reached = False

    @property
    def is_done(self) -> bool:
        return self.is_reached

    def synchronize(self) -> None:
        self._queue.run_while(lambda: not self.is_reached)


class HostStream(DeviceStream):
    """`entries`: number, work or event, and whether the event is awaited."""

    def __init__(self, queue: HostQueue) -> None:
        self._queue = queue
        self.entries: deque[tuple[int, Callable[[], None] | HostEvent, bool]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.add(self, work)

    def record(self) -> HostEvent:
        event = HostEvent(self._queue)
        self._queue.add(self, event)
        return event

    def wait(self, event: DeviceEvent) -> None:
        if not isinstance(event, HostEvent):
            raise BackendError(f"wait_event: got {type(event).__name__}, expected an event of the host")
        self._queue.add(self, event, waits=True)

    def poll(self) -> bool:
        """Runs one operation, its own or another stream's, when there is one."""
        with self._queue.lock:
            if self.entries:
                self._queue.run_one()
            return not self.entries

    def synchronize(self) -> None:
        self._queue.run_while(lambda: bool(self.entries))
