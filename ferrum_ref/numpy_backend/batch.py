"""Operations over lists of NumpyTensors.   Clauses: TN-BATCH-1..4."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorBatchOps, TensorOps, TensorRef
from ferrum_ref.numpy_backend.tensor import array_of, tensor_of, wrap
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps, common_arrays


class NumpyTensorBatchOps(TensorBatchOps):
    """Stateless but for the TensorOps that multiply."""

    def __init__(self, tensor_ops: TensorOps | None = None) -> None:
        self._tensor_ops = tensor_ops if tensor_ops is not None else NumpyTensorOps()

    def batch_matmul(self, a_batch: Sequence[TensorRef], b_batch: Sequence[TensorRef]) -> list[TensorRef]:
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

    def stack(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        arrays = common_arrays("stack", tensors)
        shape = arrays[0].shape
        if not 0 <= dim <= len(shape):
            raise ShapeError(f"stack: new axis {dim} for shape {shape}, expected 0 <= axis <= {len(shape)}")
        for index, array in enumerate(arrays):
            if array.shape != shape:
                raise ShapeError(f"stack: tensor {index} has shape {array.shape}, expected {shape} as the first")
        return wrap(np.asarray(np.stack(arrays, axis=dim), order="C"))

    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        source = tensor_of("unstack", tensor)
        shape = source.shape()
        if not 0 <= dim < len(shape):
            raise ShapeError(f"unstack: axis {dim} of shape {shape}, expected 0 <= axis < {len(shape)}")
        return [source.picked(dim, index) for index in range(shape[dim])]

    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        padded: list[TensorRef] = []
        for index, tensor in enumerate(tensors):
            array = array_of("pad_batch", tensor)
            if array.ndim != len(target_shape) or any(
                dim > target for dim, target in zip(array.shape, target_shape, strict=True)
            ):
                raise ShapeError(
                    f"pad_batch: tensor {index} has shape {array.shape}, "
                    f"expected {len(target_shape)} axes of at most {tuple(target_shape)}"
                )
            grown = np.zeros(tuple(target_shape), array.dtype)
            grown[(*map(slice, array.shape),)] = array
            padded.append(wrap(grown))
        return padded
