"""Operations that are awaited.  Clauses: BK-CUPY-50..51 (specs/backend_cupy.md), TN-ASYNC-1..4 (specs/tensor.md)."""

from __future__ import annotations

from typing import Self

from ferrum_cupy.operation_queue import OperationQueue
from ferrum_cupy.runtime import Runtime
from ferrum_cupy.tensor import CupyTensor
from ferrum_cupy.tensor_ops import CupyTensorOps
from ferrum_ref.interfaces.tensor import AsyncTensorOps, TensorRef


class CupyAsyncTensorOps(CupyTensorOps, AsyncTensorOps):
    """One queue: operations run, and finish, in the order in which they were started.

    An operation starts when its coroutine is first awaited or becomes a task. The inherited methods are launched at
    once, from the caller's thread. A context manager; `close` waits for the queue and ends its threads.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._queue: OperationQueue[CupyTensor] = OperationQueue(runtime.machine, type(self).__name__)

    async def matmul_async(self, a: TensorRef, b: TensorRef) -> CupyTensor:
        """As `matmul`: the same value, the same errors, raised where it is awaited."""
        return await self._queue.run("matmul_async", lambda: self.matmul(a, b))

    async def softmax_async(self, tensor: TensorRef, dim: int) -> CupyTensor:
        """As `softmax`."""
        return await self._queue.run("softmax_async", lambda: self.softmax(tensor, dim))

    async def synchronize(self) -> None:
        """Return when everything that was started before is done."""
        await self._queue.synchronize()

    def close(self) -> None:
        """Wait for what is queued; repeating it changes nothing. Operations started later raise BackendError."""
        self._queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
