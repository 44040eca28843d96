"""Operations over lists of tensors, and operations that are awaited.

Clauses: BK-NCPU-21 (specs/backend_numba.md), TN-BATCH-1..4, TN-ASYNC-1..4 (specs/tensor.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import numpy as np

from ferrum_numba.cpu.conversion import cast, common_type
from ferrum_numba.cpu.runtime import Runtime
from ferrum_numba.cpu.tensor import NumbaTensor
from ferrum_numba.cpu.tensor_ops import NumbaTensorOps
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import AsyncTensorOps, Shape, TensorBatchOps, TensorRef

Result = TypeVar("Result")


class NumbaTensorBatchOps(TensorBatchOps):
    """One tensor after another: each operation has all threads."""

    def __init__(self, runtime: Runtime, tensor_ops: NumbaTensorOps) -> None:
        self._runtime, self._tensor_ops = runtime, tensor_ops

    def batch_matmul(self, a_batch: Sequence[TensorRef], b_batch: Sequence[TensorRef]) -> list[TensorRef]:
        """`[matmul(a, b) for each pair]`."""
        if len(a_batch) != len(b_batch):
            raise InvalidParameterError(
                f"batch_matmul: {len(a_batch)} tensors in a_batch and {len(b_batch)} in b_batch, expected as many"
            )
        products: list[TensorRef] = []
        for index, (a, b) in enumerate(zip(a_batch, b_batch, strict=True)):
            try:
                products.append(self._tensor_ops.matmul(a, b))
            except BackendError as error:
                raise BackendError(f"batch_matmul: pair {index}: {error.message}") from error
        return products

    def stack(self, tensors: Sequence[TensorRef], dim: int) -> NumbaTensor:
        """A new axis at `dim`, 0 <= dim <= rank, one entry for each tensor, in their common type."""
        if not tensors:
            raise BackendError("stack: tensors: got none, expected at least one")
        arrays = [self._runtime.take("stack", "tensors", tensor) for tensor in tensors]
        shape, target = arrays[0].shape, arrays[0].dtype
        if not 0 <= dim <= len(shape):
            raise ShapeError(f"stack: new axis {dim} for shape {shape}, expected 0 <= axis <= {len(shape)}")
        for index, array in enumerate(arrays):
            if array.shape != shape:
                raise ShapeError(f"stack: tensor {index} has shape {array.shape}, expected {shape} as the first")
            target = target if array.dtype == target else common_type("stack", target, array.dtype)
        return NumbaTensor(np.stack([cast(array, target) for array in arrays], axis=dim))

    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        """One tensor for each index of axis `dim`, the axis removed, storage shared."""
        data = self._runtime.take("unstack", "tensor", tensor)
        if not 0 <= dim < data.ndim:
            raise ShapeError(f"unstack: axis {dim} of shape {data.shape}, expected 0 <= axis < {data.ndim}")
        return [NumbaTensor(np.moveaxis(data, dim, 0)[index, ...]) for index in range(data.shape[dim])]

    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        """Each tensor grown to `target_shape` with zeros at the end of every axis."""
        padded: list[TensorRef] = []
        for index, tensor in enumerate(tensors):
            data = self._runtime.take("pad_batch", "tensors", tensor)
            if data.ndim != len(target_shape) or any(
                dim > target for dim, target in zip(data.shape, target_shape, strict=True)
            ):
                raise ShapeError(
                    f"pad_batch: tensor {index} has shape {data.shape}, "
                    f"expected {len(target_shape)} axes of at most {tuple(target_shape)}"
                )
            grown = np.zeros(tuple(target_shape), data.dtype)
            grown[tuple(map(slice, data.shape))] = data
            padded.append(NumbaTensor(grown))
        return padded


class NumbaAsyncTensorOps(NumbaTensorOps, AsyncTensorOps):
    """One queue and one thread: operations run, and finish, in the order in which they were started.

    The inherited methods run at once in the caller's thread. A context manager; `close` waits for the queue and ends
    the thread.  [TN-ASYNC-1..4]
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="numba-cpu-tensor-ops")

    async def matmul_async(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """As `matmul`: the same value, the same errors, raised where it is awaited."""
        return await self._run("matmul_async", lambda: self.matmul(a, b))

    async def softmax_async(self, tensor: TensorRef, dim: int) -> TensorRef:
        """As `softmax`."""
        return await self._run("softmax_async", lambda: self.softmax(tensor, dim))

    async def synchronize(self) -> None:
        """Return when everything that was started before is done."""
        await self._run("synchronize", lambda: None)

    def close(self) -> None:
        """Wait for what was started, and end the thread. May be repeated; starting more is a BackendError."""
        self._queue.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _run(self, operation: str, function: Callable[[], Result]) -> Result:
        try:
            started = self._queue.submit(function)
        except RuntimeError:
            raise BackendError(
                f"{operation}: these operations have been closed; take new ones from async_tensor_ops()"
            ) from None
        return await asyncio.wrap_future(started)
