"""Operations over lists of tensors.

Clauses: BK-TORCH-27..28 (specs/backend_torch.md), TN-BATCH-1..4 (specs/tensor.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import Shape, TensorBatchOps, TensorRef
from ferrum_torch import linear
from ferrum_torch.products import Pair, products
from ferrum_torch.rounding import cast, common_type
from ferrum_torch.runtime import Runtime
from ferrum_torch.tensor import TorchTensor, is_read_only


class TorchTensorBatchOps(TensorBatchOps):
    """As few calls of torch as the list allows.  [BK-TORCH-27..28]"""

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
                pairs.append(self._checked_pair(a, b))
            except (BackendError, DeviceError) as error:
                kind = DeviceError if isinstance(error, DeviceError) else BackendError
                raise kind(f"batch_matmul: pair {index}: {error.message}") from error
        return [TorchTensor(product) for product in products(pairs)]

    def stack(self, tensors: Sequence[TensorRef], dim: int) -> TorchTensor:
        """A new axis at `dim`, 0 <= dim <= rank, one entry for each tensor, in their common type."""
        if not tensors:
            raise BackendError("stack: tensors: got none, expected at least one")
        first = self._runtime.take("stack", "tensors", tensors[0])
        shape, target = tuple(first.shape), first.dtype
        if not 0 <= dim <= first.ndim:
            raise ShapeError(f"stack: new axis {dim} for shape {shape}, expected 0 <= axis <= {first.ndim}")
        sources = [first]
        for index, tensor in enumerate(tensors[1:], 1):
            data = self._runtime.take_beside("stack", f"tensor {index}", tensor, first)
            if data.shape != first.shape:
                raise ShapeError(f"stack: tensor {index} has shape {tuple(data.shape)}, expected {shape} as the first")
            target = target if data.dtype is target else common_type("stack", target, data.dtype)
            sources.append(data)
        return TorchTensor(torch.stack([cast(data, target) for data in sources], dim))

    def unstack(self, tensor: TensorRef, dim: int) -> list[TensorRef]:
        """One tensor for each index of axis `dim`, the axis removed, storage shared."""
        data = self._runtime.take("unstack", "tensor", tensor)
        if not 0 <= dim < data.ndim:
            raise ShapeError(f"unstack: axis {dim} of shape {tuple(data.shape)}, expected 0 <= axis < {data.ndim}")
        frozen = is_read_only(tensor)
        return [TorchTensor(piece, frozen) for piece in torch.unbind(data, dim)]

    def pad_batch(self, tensors: Sequence[TensorRef], target_shape: Shape) -> list[TensorRef]:
        """Each tensor grown to `target_shape` with zeros at the end of every axis."""
        target = tuple(target_shape)
        sources: list[torch.Tensor] = []
        for index, tensor in enumerate(tensors):
            data = self._runtime.take("pad_batch", f"tensor {index}", tensor)
            if data.ndim != len(target) or any(dim > most for dim, most in zip(data.shape, target, strict=True)):
                raise ShapeError(
                    f"pad_batch: tensor {index} has shape {tuple(data.shape)}, "
                    f"expected {len(target)} axes of at most {target}"
                )
            sources.append(data)
        return [TorchTensor(grown) for grown in _grown(sources, target)]

    def _checked_pair(self, a: TensorRef, b: TensorRef) -> Pair:
        left = self._runtime.take("matmul", "a", a)
        right = self._runtime.take_beside("matmul", "b", b, left)
        linear.check_matmul(left, right)
        return left, right


def _grown(sources: Sequence[torch.Tensor], target: tuple[int, ...]) -> list[torch.Tensor]:
    """Zero-padded copies; those of one element type lie in one piece of memory, cleared by one call. Pure."""
    pieces: dict[int, torch.Tensor] = {}
    for kind in {(data.dtype, data.device) for data in sources}:
        chosen = [index for index, data in enumerate(sources) if (data.dtype, data.device) == kind]
        memory = torch.zeros((len(chosen), *target), dtype=kind[0], device=kind[1])
        pieces.update(zip(chosen, memory.unbind(0), strict=True))
    for index, data in enumerate(sources):
        pieces[index][tuple(map(slice, data.shape))] = data
    return [pieces[index] for index in range(len(sources))]
