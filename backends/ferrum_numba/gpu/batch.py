"""Operations over lists of tensors, made of the others.   Clauses: BK-NCUDA-20, TN-BATCH-1..4 (specs/tensor.md)."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_numba.gpu.factory import NumbaTensorFactory
from ferrum_numba.gpu.operands import take
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorBatchOps, TensorOps, TensorRef
from ferrum_ref.types.devices import DataType


class NumbaBatchOps(TensorOps, TensorBatchOps):
    """`TensorBatchOps` over the `TensorOps` of the class that inherits this one."""

    _runtime: Runtime

    def batch_matmul(self, a_batch: Sequence[TensorRef], b_batch: Sequence[TensorRef]) -> list[TensorRef]:
        """`[matmul(a, b) for each pair]`. Raises InvalidParameterError for lists of different length."""
        if len(a_batch) != len(b_batch):
            raise InvalidParameterError(
                f"batch_matmul: {len(a_batch)} tensors in a_batch and {len(b_batch)} in b_batch, expected as many"
            )
        products: list[TensorRef] = []
        for index, (a, b) in enumerate(zip(a_batch, b_batch, strict=True)):
            try:
                products.append(self.matmul(a, b))
            except BackendError as error:
                raise BackendError(f"batch_matmul: pair {index}: {error.message}") from error
        return products

    def stack(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        """A new axis at `dim`, one entry for each tensor. Raises BackendError for an empty list or other shapes."""
        if not tensors:
            raise BackendError("stack: tensors: got none, expected at least one")
        pieces = [take(self._runtime, "stack", "tensors", tensor) for tensor in tensors]
        shape = pieces[0].shape()
        if not 0 <= dim <= len(shape):
            raise ShapeError(f"stack: new axis {dim} for shape {shape}, expected 0 <= axis <= {len(shape)}")
        for index, piece in enumerate(pieces):
            if piece.shape() != shape:
                raise ShapeError(f"stack: tensor {index} has shape {piece.shape()}, expected {shape} as the first")
        return self.concat([piece.reshape((*shape[:dim], 1, *shape[dim:])) for piece in pieces], dim)

    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        """One tensor for each index of axis `dim`, the axis removed, storage shared. Raises BackendError."""
        data = take(self._runtime, "unstack", "tensor", tensor)
        shape = data.shape()
        if not 0 <= dim < len(shape):
            raise ShapeError(f"unstack: axis {dim} of shape {shape}, expected 0 <= axis < {len(shape)}")
        return [data.picked(dim, index) for index in range(shape[dim])]

    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        """Each tensor grown to `target_shape` with zeros at the end of every axis. Raises BackendError."""
        return [self._padded(index, tensor, tuple(target_shape)) for index, tensor in enumerate(tensors)]

    def _padded(self, index: int, tensor: TensorRef, target: Shape) -> NumbaTensor:
        grown = take(self._runtime, "pad_batch", "tensors", tensor)
        if grown.ndim() != len(target) or any(dim > most for dim, most in zip(grown.shape(), target, strict=True)):
            raise ShapeError(
                f"pad_batch: tensor {index} has shape {grown.shape()}, expected {len(target)} axes of at most {target}"
            )
        result = NumbaTensor(self._runtime, grown.flat(), grown.dtype(), grown.shape())
        for axis, most in enumerate(target):
            missing = (*result.shape()[:axis], most - result.shape()[axis], *result.shape()[axis + 1 :])
            joined = self.concat([result, self._zeros(missing, result.dtype())], axis)
            result = take(self._runtime, "pad_batch", "tensors", joined)
        return result

    def _zeros(self, shape: Shape, data_type: DataType) -> NumbaTensor:
        return NumbaTensorFactory(self._runtime).zeros(shape, data_type, self._runtime.machine.device)
