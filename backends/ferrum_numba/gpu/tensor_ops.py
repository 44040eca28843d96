"""NumbaTensorOps: the primitive operations, on float tensors; moving elements about works for every type.

Shapes, types and errors are told in `ferrum_ref.interfaces.tensor.TensorOps`.
Clauses: BK-NCUDA-8..14 (specs/backend_numba_cuda.md), TN-OPS-* (specs/tensor.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ferrum_numba.gpu import elementwise, linear, norms
from ferrum_numba.gpu.kernels.copy import copy_runs
from ferrum_numba.gpu.operands import beside, take
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.storage import BITS, carrier, common_type
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef


class NumbaTensorOps(TensorOps):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def matmul(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a @ b`, leading axes broadcast, ranks at least 2."""
        return linear.matmul(*self._pair("matmul", a, b))

    def add(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a + b`, broadcast (D-51)."""
        return elementwise.binary("add", *self._pair("add", a, b))

    def sub(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a - b`, broadcast (D-51)."""
        return elementwise.binary("sub", *self._pair("sub", a, b))

    def mul(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a * b`, broadcast (D-51)."""
        return elementwise.binary("mul", *self._pair("mul", a, b))

    def div(self, a: TensorRef, b: TensorRef) -> NumbaTensor:
        """`a / b`, broadcast (D-51); division by zero gives inf or NaN."""
        return elementwise.binary("div", *self._pair("div", a, b))

    def softmax(self, tensor: TensorRef, dim: int) -> NumbaTensor:
        """`exp(x - max) / sum(exp(x - max))` along `dim`, which may be negative; a lane of -inf only gives NaN."""
        return norms.softmax(self._one("softmax", tensor), dim)

    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> NumbaTensor:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, biased variance."""
        x, w = self._pair("layer_norm", input, weight, ("input", "weight"))
        b = None if bias is None else beside(self._runtime, "layer_norm", "bias", bias)
        return norms.layer_norm(x, w, b, eps)

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> NumbaTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        return norms.rms_norm(*self._pair("rms_norm", input, weight, ("input", "weight")), eps)

    def relu(self, tensor: TensorRef) -> NumbaTensor:
        """`max(x, 0)`; NaN stays NaN."""
        return elementwise.unary("relu", self._one("relu", tensor))

    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> NumbaTensor:
        """`x * Phi(x)`, the erf form; `approximate="tanh"` gives the tanh form (D-14)."""
        return elementwise.gelu(self._one("gelu", tensor), approximate)

    def silu(self, tensor: TensorRef) -> NumbaTensor:
        """`x * sigmoid(x)`."""
        return elementwise.unary("silu", self._one("silu", tensor))

    def concat(self, tensors: Sequence[TensorRef], dim: int) -> NumbaTensor:
        """Joined along an existing axis. Raises BackendError for an empty list or other dims that differ."""
        if not tensors:
            raise BackendError("concat: tensors: got none, expected at least one")
        first = self._one("concat", tensors[0])
        pieces = [first, *(beside(self._runtime, "concat", "tensors", tensor) for tensor in tensors[1:])]
        _check_axis("concat", "dim", first, dim)
        target = first.dtype()
        for piece in pieces[1:]:
            if piece.ndim() != first.ndim() or _without(piece, dim) != _without(first, dim):
                raise ShapeError(
                    f"concat: shapes {first.shape()} and {piece.shape()}, expected equal dimensions "
                    f"except on axis {dim}"
                )
            target = target if piece.dtype() is target else common_type("concat", target, piece.dtype())
        total = sum(piece.shape()[dim] for piece in pieces)
        shape = (*first.shape()[:dim], total, *first.shape()[dim + 1 :])
        result = NumbaTensor.empty(self._runtime, shape, target)
        bits, inner, start = BITS[carrier(target).itemsize], math.prod(shape[dim + 1 :]), 0
        for piece in (one.to_dtype(target) for one in pieces):
            length = piece.shape()[dim] * inner
            arrays = (piece.flat().view(bits), result.array.view(bits))
            sizes = (length, total * inner, start, piece.numel())
            self._runtime.launch_each(copy_runs, (bits,), piece.numel(), *arrays, *sizes)
            start += length
        return result

    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        """Consecutive pieces along `dim`, sharing storage. Raises BackendError unless sizes sum to the axis (D-51)."""
        data = self._one("split", tensor)
        _check_axis("split", "dim", data, dim)
        if any(size < 0 for size in sizes) or sum(sizes) != data.shape()[dim]:
            raise ShapeError(
                f"split: sizes: got {list(sizes)} with sum {sum(sizes)}, expected counts >= 0 that sum to "
                f"{data.shape()[dim]}, the length of axis {dim}"
            )
        pieces: list[TensorRef] = []
        start = 0
        for size in sizes:
            low, high = [0] * data.ndim(), list(data.shape())
            low[dim], high[dim] = start, start + size
            pieces.append(data.view(tuple(low), tuple(high)))
            start += size
        return pieces

    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> NumbaTensor:
        """Two axes swapped, sharing storage."""
        data = self._one("transpose", tensor)
        _check_axis("transpose", "dim0", data, dim0)
        _check_axis("transpose", "dim1", data, dim1)
        dims = list(range(data.ndim()))
        dims[dim0], dims[dim1] = dim1, dim0
        return data.permuted(tuple(dims))

    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> NumbaTensor:
        """All axes reordered, sharing storage. Raises BackendError unless `dims` is a permutation."""
        data = self._one("permute", tensor)
        if sorted(dims) != list(range(data.ndim())):
            raise ShapeError(f"permute: dims: got {tuple(dims)}, expected a permutation of {tuple(range(data.ndim()))}")
        return data.permuted(tuple(dims))

    def _one(self, operation: str, tensor: TensorRef) -> NumbaTensor:
        return take(self._runtime, operation, "tensor", tensor)

    def _pair(
        self, operation: str, a: TensorRef, b: TensorRef, names: tuple[str, str] = ("a", "b")
    ) -> tuple[NumbaTensor, NumbaTensor]:
        return take(self._runtime, operation, names[0], a), beside(self._runtime, operation, names[1], b)


def _check_axis(operation: str, argument: str, data: NumbaTensor, dim: int) -> None:
    if not 0 <= dim < data.ndim():
        raise ShapeError(
            f"{operation}: {argument}: got {dim} for shape {data.shape()}, expected 0 <= {argument} < {data.ndim()}"
        )


def _without(tensor: NumbaTensor, dim: int) -> tuple[int, ...]:
    shape = tensor.shape()
    return (*shape[:dim], *shape[dim + 1 :])
