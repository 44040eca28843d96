"""Operations that are awaited.   Clauses: BK-NCUDA-46 (specs/backend_numba_cuda.md), TN-ASYNC-1..4."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.tensor_ops import NumbaTensorOps
from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import AsyncTensorOps, TensorRef

Result = TypeVar("Result")


class NumbaAsyncTensorOps(NumbaTensorOps, AsyncTensorOps):
    """One queue: operations are launched, and finish, in the order in which they were started.

    One thread queues an operation on the backend's stream and marks its end with an event, a second waits for that
    event, so that neither the event loop nor the next launch does. Both are made when they are first needed. The
    inherited methods queue at once, in the caller's thread. A context manager.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._lock = threading.Lock()
        self._launcher: ThreadPoolExecutor | None = None
        self._waiter: ThreadPoolExecutor | None = None
        self._is_closed = False

    async def matmul_async(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """As `matmul`: the same value, complete on the device; the same errors, raised where it is awaited."""
        return await self._run("matmul_async", lambda: self.matmul(a, b))

    async def softmax_async(self, tensor: TensorRef, dim: int) -> TensorRef:
        """As `softmax`."""
        return await self._run("softmax_async", lambda: self.softmax(tensor, dim))

    async def synchronize(self) -> None:
        """Return when everything that was started before, and all else on the backend's stream, is done."""
        await self._run("synchronize", lambda: None)

    def close(self) -> None:
        """Wait for what was started, and end the threads. May be repeated; starting more is a BackendError."""
        with self._lock:
            self._is_closed = True
            launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.shutdown(wait=True)
        if self._waiter is not None:
            self._waiter.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _run(self, operation: str, function: Callable[[], Result]) -> Result:
        result, waiting = await asyncio.wrap_future(self._started(operation, function))
        await asyncio.wrap_future(waiting)
        return result

    def _started(self, operation: str, function: Callable[[], Result]) -> Future[tuple[Result, Future[None]]]:
        with self._lock:
            if self._is_closed:
                raise BackendError(
                    f"{operation}: these operations have been closed; take new ones from async_tensor_ops()"
                )
            if self._launcher is None:
                self._launcher = ThreadPoolExecutor(1, thread_name_prefix="numba-cuda-tensor-ops")
            return self._launcher.submit(lambda: self._launched(function))

    def _launched(self, function: Callable[[], Result]) -> tuple[Result, Future[None]]:
        """In the launcher's thread, the only one that makes the waiter."""
        result = function()
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, thread_name_prefix="numba-cuda-tensor-ops-wait")
        return result, self._waiter.submit(self._runtime.machine.mark())
