"""Operations that run in a worker thread, one after another.   Clauses: TN-ASYNC-1..4."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import AsyncTensorOps, TensorRef
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.parity_mode import ParityMode

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class NumpyAsyncTensorOps(NumpyTensorOps, AsyncTensorOps):
    """One queue and one thread: operations run, and finish, in the order in which they were started.

    An operation starts when its coroutine is first awaited or becomes a task. Cancelling one that waits in the queue
    takes it out; one that runs is finished and its result dropped. The inherited methods run at once in the caller's
    thread. A context manager; `close` waits for the queue and ends the thread.  [TN-ASYNC-1..4]
    """

    def __init__(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        super().__init__(parity_mode)
        self._lock = threading.Lock()
        self._queue: ThreadPoolExecutor | None = None
        self._is_closed = False

    async def matmul_async(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return await self._run("matmul_async", self.matmul, a, b)

    async def softmax_async(self, tensor: TensorRef, dim: int) -> TensorRef:
        return await self._run("softmax_async", self.softmax, tensor, dim)

    async def synchronize(self) -> None:
        await self._run("synchronize", _nothing)

    def close(self) -> None:
        """Wait for what is queued and end the thread; repeating it changes nothing. Later starts raise BackendError."""
        with self._lock:
            self._is_closed = True
            queue, self._queue = self._queue, None
        if queue is not None:
            queue.shutdown(wait=True)

    def __enter__(self) -> NumpyAsyncTensorOps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _run(
        self,
        operation: str,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        with self._lock:
            if self._is_closed:
                raise BackendError(f"{operation}: these operations have been closed; make a new NumpyAsyncTensorOps")
            if self._queue is None:
                self._queue = ThreadPoolExecutor(1, thread_name_prefix="numpy-tensor-ops")
            future = self._queue.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(future)


def _nothing() -> None:
    """What `synchronize` queues behind everything else."""
