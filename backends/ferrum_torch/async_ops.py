"""Operations that are awaited.

Clauses: BK-TORCH-29..31 (specs/backend_torch.md), TN-ASYNC-1..4 (specs/tensor.md).
"""

from __future__ import annotations

from types import TracebackType

import torch

from ferrum_ref.interfaces.tensor import AsyncTensorOps, TensorRef
from ferrum_torch.operation_queue import Function, OperationQueue
from ferrum_torch.runtime import Runtime
from ferrum_torch.tensor import TorchTensor
from ferrum_torch.tensor_ops import TorchTensorOps


class TorchAsyncTensorOps(TorchTensorOps, AsyncTensorOps):
    """One queue: operations run, and finish, in the order in which they were started.

    An operation starts when its coroutine is first awaited or becomes a task. The inherited methods run at once, in
    the caller's thread and stream. A context manager; `close` waits for the queue and ends its threads.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._queue = OperationQueue(type(self).__name__)

    async def matmul_async(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """As `matmul`: the same value, the same errors, raised where it is awaited."""
        return await self._awaited("matmul_async", lambda: self.matmul(a, b).data, a, b)

    async def softmax_async(self, tensor: TensorRef, dim: int) -> TensorRef:
        """As `softmax`."""
        return await self._awaited("softmax_async", lambda: self.softmax(tensor, dim).data, tensor)

    async def synchronize(self) -> None:
        """Return when everything that was started before is done."""
        await self._queue.synchronize()

    def close(self) -> None:
        """Wait for what is queued; repeating it changes nothing. Operations started later raise BackendError."""
        self._queue.close()

    def __enter__(self) -> TorchAsyncTensorOps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _awaited(self, operation: str, function: Function, *tensors: TensorRef) -> TorchTensor:
        operands: list[torch.Tensor] = [tensor.data for tensor in tensors if isinstance(tensor, TorchTensor)]
        return TorchTensor(await self._queue.run(operation, function, operands))
