"""NumbaTensorOps: the primitive operations.

Shapes, types and errors are told in `ferrum_ref.interfaces.tensor.TensorOps`; results of arithmetic have the
common type of both operands, others the first operand's.
Clauses: BK-NCPU-6..9 (specs/backend_numba.md), TN-OPS-* (specs/tensor.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu import elementwise, linear, norms
from ferrum_numba.cpu.conversion import cast, common_type
from ferrum_numba.cpu.runtime import Runtime
from ferrum_numba.cpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef


class NumbaTensorOps(TensorOps):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def matmul(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a @ b`, leading axes broadcast, ranks at least 2."""
        return NumbaTensor(linear.matmul(*self._pair("matmul", a, b)))

    def add(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a + b`, broadcast (D-51)."""
        return NumbaTensor(elementwise.arithmetic("add", np.add, *self._pair("add", a, b)))

    def sub(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a - b`, broadcast (D-51)."""
        return NumbaTensor(elementwise.arithmetic("sub", np.subtract, *self._pair("sub", a, b)))

    def mul(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a * b`, broadcast (D-51)."""
        return NumbaTensor(elementwise.arithmetic("mul", np.multiply, *self._pair("mul", a, b)))

    def div(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a / b`, broadcast (D-51); division by zero gives inf or NaN."""
        return NumbaTensor(elementwise.arithmetic("div", np.divide, *self._pair("div", a, b)))

    def softmax(self, tensor: TensorRef, dim: int) -> NumbaTensor:
        """`exp(x - max) / sum(exp(x - max))` along `dim`, which may be negative; a lane of -inf only gives NaN."""
        return NumbaTensor(norms.softmax(self._one("softmax", tensor), dim))

    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> NumbaTensor:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, biased variance."""
        x, w = self._pair("layer_norm", input, weight, ("input", "weight"))
        b = None if bias is None else self._runtime.take_beside("layer_norm", "bias", bias)
        return NumbaTensor(norms.layer_norm(x, w, b, eps))

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> NumbaTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        return NumbaTensor(norms.rms_norm(*self._pair("rms_norm", input, weight, ("input", "weight")), eps))

    def relu(self, tensor: TensorRef) -> NumbaTensor:
        """`max(x, 0)`; NaN stays NaN."""
        return NumbaTensor(elementwise.relu(self._one("relu", tensor)))

    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> NumbaTensor:
        """`x * Phi(x)`, the erf form; `approximate="tanh"` gives the tanh form (D-14)."""
        return NumbaTensor(elementwise.gelu(self._one("gelu", tensor), approximate))

    def silu(self, tensor: TensorRef) -> NumbaTensor:
        """`x * sigmoid(x)`."""
        return NumbaTensor(elementwise.silu(self._one("silu", tensor)))

    def concat(self, tensors: Sequence[TensorRef], dim: int) -> NumbaTensor:
        """Joined along an existing axis. Raises BackendError for an empty list or other dims that differ."""
        if not tensors:
            raise BackendError("concat: tensors: got none, expected at least one")
        first = self._one("concat", tensors[0])
        rest = [self._runtime.take_beside("concat", "tensors", tensor) for tensor in tensors[1:]]
        self._check_axis("concat", "dim", first, dim)
        target = first.dtype
        for data in rest:
            if data.ndim != first.ndim or _without(data.shape, dim) != _without(first.shape, dim):
                raise ShapeError(
                    f"concat: shapes {first.shape} and {data.shape}, expected equal dimensions except on axis {dim}"
                )
            target = target if data.dtype == target else common_type("concat", target, data.dtype)
        return NumbaTensor(np.concatenate([cast(data, target) for data in (first, *rest)], dim))

    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        """Consecutive pieces along `dim`, sharing storage. Raises BackendError unless sizes sum to the axis (D-51)."""
        data = self._one("split", tensor)
        self._check_axis("split", "dim", data, dim)
        if any(size < 0 for size in sizes) or sum(sizes) != data.shape[dim]:
            raise ShapeError(
                f"split: sizes: got {list(sizes)} with sum {sum(sizes)}, expected counts >= 0 that sum to "
                f"{data.shape[dim]}, the length of axis {dim}"
            )
        ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        return [NumbaTensor(piece) for piece in np.split(data, ends[:-1], dim)] if len(sizes) else []

    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> NumbaTensor:
        """Two axes swapped, sharing storage."""
        data = self._one("transpose", tensor)
        self._check_axis("transpose", "dim0", data, dim0)
        self._check_axis("transpose", "dim1", data, dim1)
        return NumbaTensor(np.swapaxes(data, dim0, dim1))

    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> NumbaTensor:
        """All axes reordered, sharing storage. Raises BackendError unless `dims` is a permutation."""
        data = self._one("permute", tensor)
        if sorted(dims) != list(range(data.ndim)):
            raise ShapeError(f"permute: dims: got {tuple(dims)}, expected a permutation of {tuple(range(data.ndim))}")
        return NumbaTensor(np.transpose(data, tuple(dims)))

    def _one(self, operation: str, tensor: TensorRef) -> NDArray[Any]:
        return self._runtime.take(operation, "tensor", tensor)

    def _pair(
        self, operation: str, a: TensorRef, b: TensorRef, names: tuple[str, str] = ("a", "b")
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        first = self._runtime.take(operation, names[0], a)
        return first, self._runtime.take_beside(operation, names[1], b)

    @staticmethod
    def _check_axis(operation: str, argument: str, data: NDArray[Any], dim: int) -> None:
        if not 0 <= dim < data.ndim:
            raise ShapeError(
                f"{operation}: {argument}: got {dim} for shape {data.shape}, expected 0 <= {argument} < {data.ndim}"
            )


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
