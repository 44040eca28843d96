"""Functions that are awaited: launched one after another from a thread, each complete when its result is delivered.

Clauses: BK-CUPY-50..51 (specs/backend_cupy.md), TN-ASYNC-1..4 (specs/tensor.md).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from ferrum_cupy.machine import DeviceEvent, DeviceStream, Machine
from ferrum_ref.errors import BackendError

Result = TypeVar("Result")
Job = TypeVar("Job")
Started = tuple[Result, Future[None] | None]


class OperationQueue(Generic[Result]):
    """One queue: what is started first is done first.

    A function is launched from the queue's thread into the stream that was current where it was started. So it runs
    behind what was launched there before, and memory that either side drops is used again in the stream's order, as
    CuPy's pool expects: neither operands nor results need be kept for the other. An event behind it is waited for by a
    second thread, asleep: neither the event loop nor the next launch waits. Both threads are made when first needed.
    """

    def __init__(self, machine: Machine, owner: str) -> None:
        """`owner` is the class that error messages name."""
        self._machine, self._owner = machine, owner
        self._lock = threading.Lock()
        self._launcher: ThreadPoolExecutor | None = None
        self._waiter: ThreadPoolExecutor | None = None  # the launcher's thread only, as is what follows
        self._last: DeviceEvent | None = None
        self._is_closed = False

    async def run(self, operation: str, function: Callable[[], Result]) -> Result:
        """What `function` returns, complete on the device; what it raises.

        Cancelling it before its turn takes it out of the queue; afterwards it is finished and its result dropped.
        Raises BackendError after `close`.
        """
        stream = self._machine.current_stream()
        future = self._started(operation, lambda: self._launched(function, stream))
        result, waiting = await asyncio.wrap_future(future)
        if waiting is not None:
            await asyncio.wrap_future(waiting)
        return result

    async def synchronize(self) -> None:
        """Return when everything started before is done; an error belongs to whoever awaits the operation."""
        future = self._started("synchronize", self._marked)
        _, waiting = await asyncio.wrap_future(future)
        if waiting is not None:
            await asyncio.wrap_future(waiting)

    def close(self) -> None:
        """Wait for what is queued and end the threads; repeating it changes nothing. Later starts raise BackendError.

        What is awaited by the loop that calls this is done when this returns, and delivered when the loop goes on.
        """
        with self._lock:
            self._is_closed = True
            launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.shutdown(wait=True)
        if self._waiter is not None:
            self._waiter.shutdown(wait=True)

    def _started(self, operation: str, job: Callable[[], Started[Job]]) -> Future[Started[Job]]:
        with self._lock:
            if self._is_closed:
                raise BackendError(f"{operation}: these operations have been closed; make a new {self._owner}")
            if self._launcher is None:
                self._launcher = ThreadPoolExecutor(1, thread_name_prefix="cupy-tensor-ops")
            return self._launcher.submit(job)

    def _launched(self, function: Callable[[], Result], stream: DeviceStream) -> Started[Result]:
        """In the launcher's thread: behind whatever was launched last, in that stream or another."""
        with self._machine.using(stream):
            if self._last is not None:
                stream.wait(self._last)
            result = function()
            self._last = stream.record()
        return result, self._waited(self._last)

    def _marked(self) -> Started[None]:
        """In the launcher's thread: whatever was launched last is the last to be done."""
        return None, None if self._last is None else self._waited(self._last)

    def _waited(self, done: DeviceEvent) -> Future[None] | None:
        """None for an event that has been reached already."""
        if done.is_done:
            return None
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, thread_name_prefix="cupy-tensor-ops-wait")
        return self._waiter.submit(done.synchronize)
