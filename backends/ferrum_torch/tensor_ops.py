"""TorchTensorOps: the primitive operations.

Shapes, types and errors are told in `ferrum_ref.interfaces.tensor.TensorOps`; results of arithmetic have the
common type of both operands, others the first operand's.
Clauses: BK-TORCH-8..10 (specs/backend_torch.md), TN-OPS-* (specs/tensor.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_torch import elementwise, linear, norms
from ferrum_torch.rounding import cast, common_type
from ferrum_torch.runtime import Runtime
from ferrum_torch.tensor import TorchTensor, is_read_only


class TorchTensorOps(TensorOps):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def matmul(self, a: TensorRef, b: TensorRef) -> TorchTensor:
        """`a @ b`, leading axes broadcast, ranks at least 2."""
        return TorchTensor(linear.matmul(*self._pair("matmul", a, b)))

    def add(self, a: TensorRef, b: TensorRef) -> TorchTensor:
        """`a + b`, broadcast (D-51)."""
        return TorchTensor(elementwise.arithmetic("add", torch.add, *self._pair("add", a, b)))

    def sub(self, a: TensorRef, b: TensorRef) -> TorchTensor:
        """`a - b`, broadcast (D-51)."""
        return TorchTensor(elementwise.arithmetic("sub", torch.sub, *self._pair("sub", a, b)))

    def mul(self, a: TensorRef, b: TensorRef) -> TorchTensor:
        """`a * b`, broadcast (D-51)."""
        return TorchTensor(elementwise.arithmetic("mul", torch.mul, *self._pair("mul", a, b)))

    def div(self, a: TensorRef, b: TensorRef) -> TorchTensor:
        """`a / b`, broadcast (D-51); division by zero gives inf or NaN."""
        return TorchTensor(elementwise.arithmetic("div", torch.div, *self._pair("div", a, b)))

    def softmax(self, tensor: TensorRef, dim: int) -> TorchTensor:
        """`exp(x - max) / sum(exp(x - max))` along `dim`, which may be negative; a lane of -inf only gives NaN."""
        return TorchTensor(norms.softmax(self._one("softmax", tensor), dim))

    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> TorchTensor:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, biased variance."""
        x, w = self._pair("layer_norm", input, weight, ("input", "weight"))
        b = None if bias is None else self._runtime.take_beside("layer_norm", "bias", bias, x)
        return TorchTensor(norms.layer_norm(x, w, b, eps, self._runtime.run))

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TorchTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        x, w = self._pair("rms_norm", input, weight, ("input", "weight"))
        return TorchTensor(norms.rms_norm(x, w, eps, run=self._runtime.run))

    def relu(self, tensor: TensorRef) -> TorchTensor:
        """`max(x, 0)`; NaN stays NaN."""
        return TorchTensor(elementwise.relu(self._one("relu", tensor)))

    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> TorchTensor:
        """`x * Phi(x)`, the erf form; `approximate="tanh"` gives the tanh form (D-14)."""
        return TorchTensor(elementwise.gelu(self._one("gelu", tensor), approximate, self._runtime.run))

    def silu(self, tensor: TensorRef) -> TorchTensor:
        """`x * sigmoid(x)`."""
        return TorchTensor(elementwise.silu(self._one("silu", tensor), self._runtime.run))

    def concat(self, tensors: Sequence[TensorRef], dim: int) -> TorchTensor:
        """Joined along an existing axis. Raises BackendError for an empty list or other dims that differ."""
        if not tensors:
            raise BackendError("concat: tensors: got none, expected at least one")
        first = self._one("concat", tensors[0])
        rest = [self._runtime.take_beside("concat", "tensors", tensor, first) for tensor in tensors[1:]]
        self._check_axis("concat", "dim", first, dim)
        target = first.dtype
        for data in rest:
            if data.ndim != first.ndim or _without(data.shape, dim) != _without(first.shape, dim):
                raise ShapeError(
                    f"concat: shapes {tuple(first.shape)} and {tuple(data.shape)}, expected equal dimensions "
                    f"except on axis {dim}"
                )
            target = target if data.dtype is target else common_type("concat", target, data.dtype)
        return TorchTensor(torch.cat([cast(data, target) for data in (first, *rest)], dim))

    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        """Consecutive pieces along `dim`, sharing storage. Raises BackendError unless sizes sum to the axis (D-51)."""
        data = self._one("split", tensor)
        self._check_axis("split", "dim", data, dim)
        if any(size < 0 for size in sizes) or sum(sizes) != data.shape[dim]:
            raise ShapeError(
                f"split: sizes: got {list(sizes)} with sum {sum(sizes)}, expected counts >= 0 that sum to "
                f"{data.shape[dim]}, the length of axis {dim}"
            )
        frozen = is_read_only(tensor)
        return [TorchTensor(piece, frozen) for piece in torch.split(data, list(sizes), dim)] if sizes else []

    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> TorchTensor:
        """Two axes swapped, sharing storage."""
        data = self._one("transpose", tensor)
        self._check_axis("transpose", "dim0", data, dim0)
        self._check_axis("transpose", "dim1", data, dim1)
        return TorchTensor(data.transpose(dim0, dim1), is_read_only(tensor))

    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> TorchTensor:
        """All axes reordered, sharing storage. Raises BackendError unless `dims` is a permutation."""
        data = self._one("permute", tensor)
        if sorted(dims) != list(range(data.ndim)):
            raise ShapeError(f"permute: dims: got {tuple(dims)}, expected a permutation of {tuple(range(data.ndim))}")
        return TorchTensor(data.permute(*dims), is_read_only(tensor))

    def _one(self, operation: str, tensor: TensorRef) -> torch.Tensor:
        return self._runtime.take(operation, "tensor", tensor)

    def _pair(
        self, operation: str, a: TensorRef, b: TensorRef, names: tuple[str, str] = ("a", "b")
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self._runtime.take(operation, names[0], a)
        return first, self._runtime.take_beside(operation, names[1], b, first)

    @staticmethod
    def _check_axis(operation: str, argument: str, data: torch.Tensor, dim: int) -> None:
        if not 0 <= dim < data.ndim:
            raise ShapeError(
                f"{operation}: {argument}: got {dim} for shape {tuple(data.shape)}, "
                f"expected 0 <= {argument} < {data.ndim}"
            )


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
