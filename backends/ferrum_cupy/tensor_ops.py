"""CupyTensorOps: the primitive operations.  Clauses: BK-CUPY-7..8, TN-OPS-* (specs/tensor.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ferrum_cupy import launches, linear
from ferrum_cupy.machine import STORAGE
from ferrum_cupy.runtime import Runtime
from ferrum_cupy.storage import ARRAY_TYPES, FLOATS, cast, common_type, narrow
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef, are_broadcastable
from ferrum_ref.types.devices import DataType


class CupyTensorOps(TensorOps):
    """Results of arithmetic have the operands' common type, others the first operand's."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def matmul(self, a: TensorRef, b: TensorRef) -> CupyTensor:
        """`a @ b`, leading axes broadcast, ranks at least 2."""
        first = self._runtime.take("matmul", "a", a)
        return linear.matmul(self._runtime, first, self._runtime.beside("matmul", "b", b))

    def add(self, a: TensorRef, b: TensorRef) -> CupyTensor:
        """`a + b`, broadcast (D-51)."""
        return self._arithmetic("add", lambda x, y: x + y, a, b)

    def sub(self, a: TensorRef, b: TensorRef) -> CupyTensor:
        """`a - b`, broadcast (D-51)."""
        return self._arithmetic("sub", lambda x, y: x - y, a, b)

    def mul(self, a: TensorRef, b: TensorRef) -> CupyTensor:
        """`a * b`, broadcast (D-51)."""
        return self._arithmetic("mul", lambda x, y: x * y, a, b)

    def div(self, a: TensorRef, b: TensorRef) -> CupyTensor:
        """`a / b`, broadcast (D-51); division by zero gives inf or NaN."""
        return self._arithmetic("div", lambda x, y: x / y, a, b)

    def softmax(self, tensor: TensorRef, dim: int) -> CupyTensor:
        """`exp(x - max) / sum(exp(x - max))` along `dim`, which may be negative; a lane of -inf only gives NaN."""
        return launches.softmax(self._runtime, self._float("softmax", "tensor", tensor), dim)

    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> CupyTensor:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, biased variance."""
        return launches.layer_norm(self._runtime, self._float("layer_norm", "input", input), weight, bias, eps)

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> CupyTensor:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""
        return launches.rms_norm(self._runtime, "rms_norm", self._float("rms_norm", "input", input), weight, eps)

    def relu(self, tensor: TensorRef) -> CupyTensor:
        """`max(x, 0)`; NaN stays NaN."""
        return launches.pointwise(self._runtime, "relu", self._float("relu", "tensor", tensor))

    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> CupyTensor:
        """`x * Phi(x)`, the erf form; `approximate="tanh"` gives the tanh form (D-14)."""
        if approximate not in ("none", "tanh"):
            raise InvalidParameterError(f"gelu: approximate: got {approximate!r}, expected 'none' or 'tanh'")
        kernel = "gelu" if approximate == "none" else "gelu_tanh"
        return launches.pointwise(self._runtime, kernel, self._float("gelu", "tensor", tensor))

    def silu(self, tensor: TensorRef) -> CupyTensor:
        """`x * sigmoid(x)`."""
        return launches.pointwise(self._runtime, "silu", self._float("silu", "tensor", tensor))

    def concat(self, tensors: Sequence[TensorRef], dim: int) -> CupyTensor:
        """Joined along an existing axis. Raises BackendError for an empty list or other dims that differ."""
        if not tensors:
            raise BackendError("concat: tensors: got none, expected at least one")
        first = self._runtime.take("concat", "tensors", tensors[0])
        parts = [first, *(self._runtime.beside("concat", "tensors", tensor) for tensor in tensors[1:])]
        _check_axis("concat", "dim", first, dim)
        kind = first.kind
        for part in parts[1:]:
            shapes = [shape[:dim] + shape[dim + 1 :] for shape in (first.shape(), part.shape())]
            if len(part.shape()) != len(first.shape()) or shapes[0] != shapes[1]:
                raise ShapeError(
                    f"concat: shapes {first.shape()} and {part.shape()}, expected equal dimensions except on axis {dim}"
                )
            kind = kind if part.kind is kind else common_type("concat", kind, part.kind)
        xp = self._runtime.machine.xp
        arrays = [cast(xp, part.array, part.kind, kind) for part in parts]
        return CupyTensor(self._runtime.machine, xp.concatenate(arrays, dim), kind)

    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        """Consecutive pieces along `dim`, sharing storage. Raises BackendError unless sizes sum to the axis (D-51)."""
        whole = self._runtime.take("split", "tensor", tensor)
        _check_axis("split", "dim", whole, dim)
        shape = whole.shape()
        if any(size < 0 for size in sizes) or sum(sizes) != shape[dim]:
            raise ShapeError(
                f"split: sizes: got {list(sizes)} with sum {sum(sizes)}, expected counts >= 0 that sum to "
                f"{shape[dim]}, the length of axis {dim}"
            )
        pieces: list[TensorRef] = []
        start = 0
        for size in sizes:
            low, high = [0] * len(shape), list(shape)
            low[dim], high[dim] = start, start + size
            pieces.append(whole.view(tuple(low), tuple(high)))
            start += size
        return pieces

    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> CupyTensor:
        """Two axes swapped, sharing storage."""
        x = self._runtime.take("transpose", "tensor", tensor)
        _check_axis("transpose", "dim0", x, dim0)
        _check_axis("transpose", "dim1", x, dim1)
        return CupyTensor(self._runtime.machine, x.array.swapaxes(dim0, dim1), x.kind, x.is_read_only)

    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> CupyTensor:
        """All axes reordered, sharing storage. Raises BackendError unless `dims` is a permutation."""
        x = self._runtime.take("permute", "tensor", tensor)
        rank = len(x.shape())
        if sorted(dims) != list(range(rank)):
            raise ShapeError(f"permute: dims: got {tuple(dims)}, expected a permutation of {tuple(range(rank))}")
        return CupyTensor(self._runtime.machine, x.array.transpose(tuple(dims)), x.kind, x.is_read_only)

    def _float(self, operation: str, argument: str, tensor: TensorRef) -> CupyTensor:
        return self._runtime.float_of(operation, argument, self._runtime.take(operation, argument, tensor))

    def _arithmetic(
        self, operation: str, function: Callable[[Any, Any], Any], a: TensorRef, b: TensorRef
    ) -> CupyTensor:
        """function(a, b), broadcast, rounded once to the common type; integers wrap, a quotient of integers is fp32."""
        first = self._runtime.take(operation, "a", a)
        second = self._runtime.beside(operation, "b", b)
        if first.shape() != second.shape() and not are_broadcastable(first.shape(), second.shape()):
            raise ShapeError(
                f"{operation}: shapes {first.shape()} and {second.shape()} do not broadcast; "
                "expected dimensions, aligned at the right, to be equal or 1"
            )
        kind, machine = common_type(operation, first.kind, second.kind), self._runtime.machine
        with np.errstate(all="ignore"):
            if first.kind in FLOATS and second.kind in FLOATS:
                return self._floats(operation, first, second, kind)
            if kind in FLOATS:
                wide = [self._wide(part, np.float64) for part in (first, second)]
                return CupyTensor(machine, narrow(machine.xp, machine.xp.asarray(function(*wide)), kind), kind)
            if operation == "div":
                quotient = function(first.array.astype(np.float64), second.array.astype(np.float64))
                return CupyTensor(machine, machine.xp.asarray(quotient.astype(np.float32)), DataType.FP32)
            result = function(first.array.astype(np.int64), second.array.astype(np.int64))
            return CupyTensor(machine, machine.xp.asarray(result).astype(ARRAY_TYPES[kind]), kind)

    def _floats(self, operation: str, first: CupyTensor, second: CupyTensor, kind: DataType) -> CupyTensor:
        """By a kernel in float32: CuPy's own kernels take subnormal numbers for zero."""
        runtime, machine = self._runtime, self._runtime.machine
        if first.kind is second.kind and kind in STORAGE:
            return CupyTensor(
                machine, launches.pairwise(runtime, f"{operation}_each", first.array, second.array, kind), kind
            )
        wide = (runtime.wide(operation, first), runtime.wide(operation, second))
        y = launches.pairwise(runtime, f"{operation}_each", *wide, DataType.FP32)
        return CupyTensor(machine, narrow(machine.xp, y, kind), kind)

    def _wide(self, tensor: CupyTensor, compute: Any) -> Any:
        if tensor.kind in FLOATS:
            return self._runtime.wide("arithmetic", tensor).astype(compute, copy=False)
        return tensor.array.astype(compute)


def _check_axis(operation: str, argument: str, tensor: CupyTensor, dim: int) -> None:
    rank = len(tensor.shape())
    if not 0 <= dim < rank:
        raise ShapeError(
            f"{operation}: {argument}: got {dim} for shape {tensor.shape()}, expected 0 <= {argument} < {rank}"
        )
