"""Primitive mathematics on NumpyTensors.   Clauses: TN-OPS-1..13."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.errors import ShapeError
from ferrum_ref.interfaces.tensor import Array, TensorOps, TensorRef, matmul_output_shape
from ferrum_ref.kernels.activation import gelu, relu, silu
from ferrum_ref.kernels.norm import layer_norm, rms_norm
from ferrum_ref.kernels.rounding import cast, compute_dtype, round_to, widen
from ferrum_ref.kernels.softmax import softmax
from ferrum_ref.numpy_backend import elementwise
from ferrum_ref.numpy_backend.dtypes import common_type
from ferrum_ref.numpy_backend.tensor import NumpyTensor, array_of, tensor_of, wrap
from ferrum_ref.types.parity_mode import ParityMode


class NumpyTensorOps(TensorOps):
    """Stateless; every result is a new tensor, transposes and pieces share memory with their source.

    UPSTREAM: `gelu` is the tanh form and `split` drops what its sizes leave over.  [TN-OPS-12..13]
    """

    def __init__(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        self._parity_mode = parity_mode

    def matmul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        x, y = array_of("matmul", a), array_of("matmul", b)
        compute = compute_dtype("matmul", x, y)
        matmul_output_shape(x.shape, y.shape)
        with np.errstate(all="ignore"):
            product = np.matmul(widen(x, compute), widen(y, compute))
            return NumpyTensor(round_to(product, common_type("matmul", x.dtype, y.dtype)))

    def add(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return NumpyTensor(elementwise.add(array_of("add", a), array_of("add", b)))

    def sub(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return NumpyTensor(elementwise.sub(array_of("sub", a), array_of("sub", b)))

    def mul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return NumpyTensor(elementwise.mul(array_of("mul", a), array_of("mul", b)))

    def div(self, a: TensorRef, b: TensorRef) -> TensorRef:
        return NumpyTensor(elementwise.div(array_of("div", a), array_of("div", b)))

    def softmax(self, tensor: TensorRef, dim: int, *, masked_lanes: str = "nan") -> TensorRef:
        return NumpyTensor(softmax(array_of("softmax", tensor), dim, masked_lanes))

    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> TensorRef:
        offset = None if bias is None else array_of("layer_norm", bias)
        return NumpyTensor(layer_norm(array_of("layer_norm", input), array_of("layer_norm", weight), offset, eps))

    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        return NumpyTensor(rms_norm(array_of("rms_norm", input), array_of("rms_norm", weight), eps))

    def relu(self, tensor: TensorRef) -> TensorRef:
        return NumpyTensor(relu(array_of("relu", tensor)))

    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> TensorRef:
        if self._parity_mode is ParityMode.UPSTREAM and approximate == "none":
            approximate = "tanh"
        return NumpyTensor(gelu(array_of("gelu", tensor), approximate))

    def silu(self, tensor: TensorRef) -> TensorRef:
        return NumpyTensor(silu(array_of("silu", tensor)))

    def concat(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        arrays = common_arrays("concat", tensors)
        first = arrays[0]
        _check_axis("concat", dim, first.shape)
        for index, array in enumerate(arrays[1:], 1):
            if array.ndim != first.ndim or any(
                a != b for axis, (a, b) in enumerate(zip(array.shape, first.shape, strict=True)) if axis != dim
            ):
                raise ShapeError(
                    f"concat: tensor {index} has shape {array.shape}, expected {first.shape} except on axis {dim}"
                )
        return wrap(np.asarray(np.concatenate(arrays, axis=dim), order="C"))

    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        source = tensor_of("split", tensor)
        shape = source.shape()
        _check_axis("split", dim, shape)
        total = sum(sizes)
        drops_tail = self._parity_mode is ParityMode.UPSTREAM and total < shape[dim]
        if any(size < 0 for size in sizes) or (total != shape[dim] and not drops_tail):
            raise ShapeError(
                f"split: sizes {tuple(sizes)} on axis {dim} of shape {shape}, "
                f"expected sizes of 0 or more that sum to {shape[dim]}"
            )
        pieces: list[TensorRef] = []
        start = 0
        for size in sizes:
            pieces.append(source.narrowed(dim, start, size))
            start += size
        return pieces

    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> TensorRef:
        source = tensor_of("transpose", tensor)
        _check_axis("transpose", dim0, source.shape())
        _check_axis("transpose", dim1, source.shape())
        dims = list(range(source.ndim()))
        dims[dim0], dims[dim1] = dim1, dim0
        return source.permuted(tuple(dims))

    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> TensorRef:
        source = tensor_of("permute", tensor)
        if sorted(dims) != list(range(source.ndim())):
            raise ShapeError(
                f"permute: dims {tuple(dims)} for shape {source.shape()}, expected each of 0..{source.ndim() - 1} once"
            )
        return source.permuted(tuple(dims))


def common_arrays(operation: str, tensors: Sequence[TensorRef]) -> list[Array]:
    """The arrays behind some tensors, all in their common type (TN-DTYPE-2).

    Raises BackendError for an empty list, another backend's tensor, or types that have none in common.
    """
    if not tensors:
        raise ShapeError(f"{operation}: no tensors, expected at least one")
    arrays = [array_of(operation, tensor) for tensor in tensors]
    target = arrays[0].dtype
    for array in arrays[1:]:
        target = target if array.dtype == target else common_type(operation, target, array.dtype)
    return [cast(array, target) for array in arrays]


def _check_axis(operation: str, dim: int, shape: tuple[int, ...]) -> None:
    if not 0 <= dim < len(shape):
        raise ShapeError(f"{operation}: axis {dim} of shape {shape}, expected 0 <= axis < {len(shape)}")
