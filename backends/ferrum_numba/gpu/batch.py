"""Operations over lists of tensors, in few launches.

Clauses: BK-NCUDA-45 (specs/backend_numba_cuda.md), TN-BATCH-1..4 (specs/tensor.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ferrum_numba.gpu import linear
from ferrum_numba.gpu.kernels.copy import scatter_strided
from ferrum_numba.gpu.operands import beside, take
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.storage import BITS, carrier
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_numba.gpu.tensor_ops import NumbaTensorOps
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorBatchOps, TensorRef
from ferrum_ref.types.devices import DataType


class NumbaTensorBatchOps(TensorBatchOps):
    """Pairs of equal shapes are one product; padded tensors of one element type lie in one piece of memory."""

    def __init__(self, runtime: Runtime, tensor_ops: NumbaTensorOps) -> None:
        self._runtime, self._tensor_ops = runtime, tensor_ops

    def batch_matmul(self, a_batch: Sequence[TensorRef], b_batch: Sequence[TensorRef]) -> list[TensorRef]:
        """`[matmul(a, b) for each pair]`; every pair is checked before the first is multiplied.

        Raises InvalidParameterError for lists of different length; BackendError, naming the pair, where matmul does.
        """
        if len(a_batch) != len(b_batch):
            raise InvalidParameterError(
                f"batch_matmul: {len(a_batch)} tensors in a_batch and {len(b_batch)} in b_batch, expected as many"
            )
        groups: dict[linear.ProductShape, list[int]] = {}
        pairs: list[tuple[NumbaTensor, NumbaTensor]] = []
        for index, (a, b) in enumerate(zip(a_batch, b_batch, strict=True)):
            try:
                pair = take(self._runtime, "matmul", "a", a), beside(self._runtime, "matmul", "b", b)
                groups.setdefault(linear.product_shape(*pair), []).append(index)
            except BackendError as error:
                raise BackendError(f"batch_matmul: pair {index}: {error.message}") from error
            pairs.append(pair)
        products: dict[int, TensorRef] = {}
        for shape, indices in groups.items():
            products.update(zip(indices, linear.products([pairs[index] for index in indices], shape), strict=True))
        return [products[index] for index in range(len(pairs))]

    def stack(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        """A new axis at `dim`, one entry for each tensor, in their common type.

        Raises BackendError for an empty list; ShapeError for shapes that differ or an axis out of range.
        """
        if not tensors:
            raise BackendError("stack: tensors: got none, expected at least one")
        pieces = [take(self._runtime, "stack", "tensors", tensor) for tensor in tensors]
        shape = pieces[0].shape()
        if not 0 <= dim <= len(shape):
            raise ShapeError(f"stack: new axis {dim} for shape {shape}, expected 0 <= axis <= {len(shape)}")
        for index, piece in enumerate(pieces):
            if piece.shape() != shape:
                raise ShapeError(f"stack: tensor {index} has shape {piece.shape()}, expected {shape} as the first")
        return self._tensor_ops.concat([piece.reshape((*shape[:dim], 1, *shape[dim:])) for piece in pieces], dim)

    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        """One tensor for each index of axis `dim`, the axis removed, storage shared. Raises ShapeError."""
        data = take(self._runtime, "unstack", "tensor", tensor)
        shape = data.shape()
        if not 0 <= dim < len(shape):
            raise ShapeError(f"unstack: axis {dim} of shape {shape}, expected 0 <= axis < {len(shape)}")
        return [data.picked(dim, index) for index in range(shape[dim])]

    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        """Each tensor grown to `target_shape` with zeros at the end of every axis, as a new tensor of its type.

        Raises ShapeError, naming the tensor, for another rank or an axis longer than the target's.
        """
        target = tuple(target_shape)
        sources: list[NumbaTensor] = []
        for index, tensor in enumerate(tensors):
            data = take(self._runtime, "pad_batch", "tensors", tensor)
            if data.ndim() != len(target) or any(dim > most for dim, most in zip(data.shape(), target, strict=True)):
                raise ShapeError(
                    f"pad_batch: tensor {index} has shape {data.shape()}, "
                    f"expected {len(target)} axes of at most {target}"
                )
            sources.append(data)
        padded: dict[int, TensorRef] = {}
        for data_type in {data.dtype(): None for data in sources}:
            chosen = [index for index, data in enumerate(sources) if data.dtype() is data_type]
            padded.update(zip(chosen, self._padded([sources[index] for index in chosen], target), strict=True))
        return [padded[index] for index in range(len(sources))]

    def _padded(self, sources: Sequence[NumbaTensor], target: Shape) -> list[NumbaTensor]:
        data_type, count = sources[0].dtype(), math.prod(target)
        memory = NumbaTensor.zeros(self._runtime, (len(sources), *target), data_type)
        grown = [memory.picked(0, index) for index in range(len(sources))]
        for source, piece in zip(sources, grown, strict=True):
            self._place(source, piece, data_type, count)
        return grown

    def _place(self, source: NumbaTensor, target: NumbaTensor, data_type: DataType, count: int) -> None:
        """source into the lowest corner of target, which is contiguous."""
        if source.numel() == 0 or count == 0:
            return
        bits = BITS[carrier(data_type).itemsize]
        sizes, strides = self._runtime.shape_on_device(source.shape()), self._runtime.shape_on_device(target.strides)
        arrays = (source.flat().view(bits), target.flat().view(bits), sizes, strides)
        self._runtime.launch_each(
            scatter_strided, (bits,), source.numel(), *arrays, len(source.shape()), source.numel()
        )
