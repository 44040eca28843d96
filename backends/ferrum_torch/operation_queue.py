"""Functions that are awaited: one after another, in a thread, and on a GPU in a stream, of their own.

Clauses: BK-TORCH-29..31 (specs/backend_torch.md), TN-ASYNC-1..4 (specs/tensor.md).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ferrum_ref.errors import BackendError

Function = Callable[[], torch.Tensor]
Started = tuple[torch.Tensor, Future[None] | None]


class OperationQueue:
    """One queue: what is started first is done first.

    A function whose operands lie on the CPU is computed in the queue's thread. One whose operands lie on a GPU is
    launched from that thread into a stream of the queue's own, behind what the caller's stream had been given by then;
    a second thread waits for its event, so that neither the event loop nor the next launch does. The two threads and
    the streams are made when they are first needed.
    """

    def __init__(self, owner: str) -> None:
        """`owner` is the class that error messages name."""
        self._owner = owner
        self._lock = threading.Lock()
        self._launcher: ThreadPoolExecutor | None = None
        self._waiter: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # the launcher's thread only, as is what follows
        self._last: tuple[torch.device, torch.cuda.Event] | None = None

    async def run(self, operation: str, function: Function, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `function` returns, complete on its device; what it raises. It reads `operands`, all on one device.

        Cancelling it before its turn takes it out of the queue; afterwards, it is finished and its result dropped.
        Raises BackendError after `close`.
        """
        gpu = next((data.device for data in operands if data.is_cuda), None)
        if gpu is None:
            return (await self._started(operation, lambda: (function(), None)))[0]
        callers = torch.cuda.current_stream(gpu)
        ready = callers.record_event()
        result, waiting = await self._started(
            operation, lambda: self._launched(gpu, function, operands, (callers, ready))
        )
        if waiting is not None:
            await asyncio.wrap_future(waiting)
        return result

    async def synchronize(self) -> None:
        """Return when everything started before is done; an error belongs to whoever awaits the operation."""
        _, waiting = await self._started("synchronize", self._marked)
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

    async def _started(self, operation: str, job: Callable[[], Started]) -> Started:
        with self._lock:
            if self._is_closed:
                raise BackendError(f"{operation}: these operations have been closed; make a new {self._owner}")
            if self._launcher is None:
                self._launcher = ThreadPoolExecutor(1, thread_name_prefix="torch-tensor-ops")
            future = self._launcher.submit(job)
        return await asyncio.wrap_future(future)

    def _launched(
        self,
        gpu: torch.device,
        function: Function,
        operands: Sequence[torch.Tensor],
        caller: tuple[torch.cuda.Stream, torch.cuda.Event],
    ) -> Started:
        """In the launcher's thread: enqueue the function, and say when it is done on the GPU.

        The allocator is told who else reads what: the operands belong to the caller's stream and are read by this
        one, the result belongs to this one and will be read by the caller's.
        """
        callers, ready = caller
        if self._last is not None and self._last[0] != gpu:
            self._last[1].synchronize()  # streams of two GPUs keep no order between them
        stream = self._stream(gpu)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for data in operands:
                data.record_stream(stream)
            result = function()
            result.record_stream(callers)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # to wait asleep, not spinning
            done.record(stream)
        self._last = gpu, done
        return result, self._waited(done)

    def _marked(self) -> Started:
        """In the launcher's thread: whatever was launched last is the last to be done."""
        return torch.empty(0), None if self._last is None else self._waited(self._last[1])

    def _waited(self, done: torch.cuda.Event) -> Future[None]:
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, thread_name_prefix="torch-tensor-ops-wait")
        return self._waiter.submit(done.synchronize)

    def _stream(self, gpu: torch.device) -> torch.cuda.Stream:
        if gpu not in self._streams:
            made: torch.cuda.Stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
            self._streams[gpu] = made
        return self._streams[gpu]
