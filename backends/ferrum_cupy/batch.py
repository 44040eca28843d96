"""Operations over lists of tensors.

Clauses: BK-CUPY-47..49 (specs/backend_cupy.md), TN-BATCH-1..4 (specs/tensor.md).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from ferrum_cupy import linear
from ferrum_cupy.machine import DeviceArray
from ferrum_cupy.products import Pair, products
from ferrum_cupy.runtime import Runtime
from ferrum_cupy.storage import ARRAY_TYPES, cast, common_type
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorBatchOps, TensorRef


class CupyTensorBatchOps(TensorBatchOps):
    """As few launches as the list allows.  [BK-CUPY-47..49]"""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def batch_matmul(self, a_batch: Sequence[TensorRef], b_batch: Sequence[TensorRef]) -> list[TensorRef]:
        """`[matmul(a, b) for each pair]`; every pair is checked before the first is multiplied."""
        if len(a_batch) != len(b_batch):
            raise InvalidParameterError(
                f"batch_matmul: {len(a_batch)} tensors in a_batch and {len(b_batch)} in b_batch, expected as many"
            )
        pairs: list[Pair] = []
        for index, (a, b) in enumerate(zip(a_batch, b_batch, strict=True)):
            try:
                pairs.append((self._runtime.take("matmul", "a", a), self._runtime.beside("matmul", "b", b)))
                linear.check_matmul(*pairs[-1])
            except BackendError as error:
                raise BackendError(f"batch_matmul: pair {index}: {error.message}") from error
        return list(products(self._runtime, pairs))

    def stack(self, tensors: Sequence[TensorRef], dim: int) -> CupyTensor:
        """A new axis at `dim`, 0 <= dim <= rank, one entry for each tensor, in their common type."""
        if not tensors:
            raise BackendError("stack: tensors: got none, expected at least one")
        parts = [self._runtime.take("stack", f"tensor {index}", tensor) for index, tensor in enumerate(tensors)]
        shape, kind = parts[0].shape(), parts[0].kind
        if not 0 <= dim <= len(shape):
            raise ShapeError(f"stack: new axis {dim} for shape {shape}, expected 0 <= axis <= {len(shape)}")
        for index, part in enumerate(parts):
            if part.shape() != shape:
                raise ShapeError(f"stack: tensor {index} has shape {part.shape()}, expected {shape} as the first")
            kind = kind if part.kind is kind else common_type("stack", kind, part.kind)
        machine = self._runtime.machine
        arrays = [cast(machine.xp, part.array, part.kind, kind) for part in parts]
        return CupyTensor(machine, machine.xp.stack(arrays, dim), kind)

    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        """One tensor for each index of axis `dim`, the axis removed, storage shared."""
        whole = self._runtime.take("unstack", "tensor", tensor)
        shape, machine = whole.shape(), self._runtime.machine
        if not 0 <= dim < len(shape):
            raise ShapeError(f"unstack: axis {dim} of shape {shape}, expected 0 <= axis < {len(shape)}")
        first = machine.xp.moveaxis(whole.array, dim, 0)
        return [CupyTensor(machine, first[i, ...], whole.kind, whole.is_read_only) for i in range(shape[dim])]

    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        """Each tensor grown to `target_shape` with zeros at the end of every axis."""
        target = tuple(target_shape)
        parts = [self._runtime.take("pad_batch", f"tensor {index}", tensor) for index, tensor in enumerate(tensors)]
        for index, part in enumerate(parts):
            shape = part.shape()
            if len(shape) != len(target) or any(dim > most for dim, most in zip(shape, target, strict=True)):
                raise ShapeError(
                    f"pad_batch: tensor {index} has shape {shape}, expected {len(target)} axes of at most {target}"
                )
        grown = self._cleared(parts, target)
        for part, memory in zip(parts, grown, strict=True):
            memory[tuple(map(slice, part.shape()))] = part.array
        return [CupyTensor(self._runtime.machine, memory, part.kind) for part, memory in zip(parts, grown, strict=True)]

    def _cleared(self, parts: Sequence[CupyTensor], target: Shape) -> list[DeviceArray]:
        """Zeros for each; those of one element type lie in one piece of memory, cleared by one launch."""
        totals, zeros = Counter(part.kind for part in parts), self._runtime.machine.xp.zeros
        whole = {kind: zeros((total, *target), ARRAY_TYPES[kind]) for kind, total in totals.items()}
        places = {kind: itertools.count() for kind in totals}
        return [whole[part.kind][next(places[part.kind]), ...] for part in parts]
