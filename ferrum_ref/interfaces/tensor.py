"""Tensors as the contracts see them: handles that know their shape, a factory, and primitive operations.

Upstream: `ferrum_interfaces::tensor`. Every operation takes and returns handles (`TensorRef`); what lies behind a
handle is the backend's own affair. Where upstream leaves a point open (broadcasting, NaN), numpy's rules hold.
Clauses: TN-* in specs/tensor.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, ModelError, ShapeError
from ferrum_ref.types.devices import DataType, Device

Shape: TypeAlias = tuple[int, ...]
Array: TypeAlias = NDArray[Any]


@runtime_checkable
class TensorLike(Protocol):
    """An n-dimensional array on some device; immutable by convention.  [TN-LIKE-1..10]

    A backend's tensor class inherits from this one to get the provided methods. Without `to_numpy` there is no host
    access, and the methods built on it raise ModelError, as upstream's default bodies do.
    """

    __slots__ = ()

    @abstractmethod
    def shape(self) -> Shape:
        """Dimensions, outermost first; `()` for a scalar. Pure."""

    @abstractmethod
    def dtype(self) -> DataType:
        """The logical element type. Pure."""

    @abstractmethod
    def device(self) -> Device:
        """Where the data lies. Pure."""

    @abstractmethod
    def is_contiguous(self) -> bool:
        """True when the elements lie in row-major order without gaps. Pure."""

    @abstractmethod
    def view(self, start: Shape, end: Shape) -> TensorRef:
        """The box `start[i]:end[i]` along every axis i; rank is kept, storage shared where possible.  [TN-LIKE-3]

        Raises InvalidParameterError unless both have one entry per axis and 0 <= start <= end <= dim.
        """

    @abstractmethod
    def reshape(self, shape: Shape) -> TensorRef:
        """The same elements in row-major order under another shape (no -1).  [TN-LIKE-4]

        Raises BackendError if the number of elements differs.
        """

    @abstractmethod
    def to_cpu(self) -> TensorRef:
        """The same values on the CPU; may return self."""

    @abstractmethod
    def to_device(self, device: Device) -> TensorRef:
        """The same values on `device`. Raises DeviceError if this backend has no such device.  [TN-LIKE-5]"""

    @abstractmethod
    def to_dtype(self, dtype: DataType) -> TensorRef:
        """The same values rounded to `dtype`: to nearest, ties to even; saturation as TN-CAST-1..5 say.

        Raises DeviceError if the backend lacks the type or a NaN has no counterpart in it.
        """

    def to_numpy(self) -> Array:
        """The elements as an ndarray on the host, in their own element type; a view where possible (extension).

        FP16 is `float16`; BF16, FP8, INT4 and UINT4 are the types of `ml_dtypes`.  [TN-LIKE-6]
        Raises ModelError (this default body): no host access.
        """
        raise ModelError(f"to_numpy: {type(self).__name__} offers no host access; implement to_numpy in its class")

    def as_any(self) -> Any:
        """Self: upstream's way for a backend to recognise its own class. Python has `isinstance`."""
        return self

    def numel(self) -> int:
        """Number of elements: 1 for a scalar, 0 if any dimension is 0.  [TN-LIKE-1]"""
        return math.prod(self.shape())

    def ndim(self) -> int:
        """Number of dimensions.  [TN-LIKE-1]"""
        return len(self.shape())

    def is_scalar(self) -> bool:
        """True only for shape `()`; a `(1,)` tensor is no scalar.  [TN-LIKE-1]"""
        return self.shape() == ()

    def size_bytes(self) -> int:
        """`numel * dtype.size_bytes()`: over-counts packed 4-bit data twofold, as upstream does (D-07).  [TN-LIKE-2]"""
        return self.numel() * self.dtype().size_bytes()

    def to_vec_f32(self) -> NDArray[np.float32]:
        """All elements, flat in row-major order, as a float32 copy (D-12).  [TN-LIKE-7]

        Raises ModelError without host access.
        """
        return np.array(self.to_numpy(), dtype=np.float32).reshape(-1)

    def to_vec_u32(self) -> list[int]:
        """All elements, flat in row-major order, as Python ints in [0, 2**32) (D-13).  [TN-LIKE-8]

        Raises ModelError without host access; InvalidParameterError on a value that is not such an integer.
        """
        flat = np.asarray(self.to_numpy()).reshape(-1)
        if flat.dtype.kind not in "iub":
            flat = flat.astype(np.float64)
        bad = (flat < 0) | (flat >= 2**32)
        if flat.dtype.kind == "f":
            bad |= ~(flat == np.floor(flat))
        if bad.any():
            index = int(bad.argmax())
            raise InvalidParameterError(
                f"to_vec_u32: element {index} is {flat[index]}, expected an integer in [0, 2**32); "
                "keep token ids in an integer dtype (TensorFactory.from_ids)"
            )
        return [int(value) for value in flat.tolist()]

    def argmax_last_dim_u32(self) -> int:
        """Index of the first maximum of one row of the last axis.  [TN-LIKE-9]

        Rank 1: the row itself. Rank 2 `[B, V]`: batch entry 0. Rank 3 and more `[B, ..., T, V]`: batch entry 0, last
        position of every other axis. Raises ModelError without host access; BackendError on a scalar, an empty row,
        a NaN, or a row of -inf only.
        """
        values = np.asarray(self.to_numpy())
        if values.ndim == 0 or values.size == 0:
            raise ShapeError(f"argmax_last_dim_u32: shape {values.shape}, expected at least one row with one element")
        row = values[(0,) + (-1,) * (values.ndim - 2)] if values.ndim > 1 else values
        if row.dtype.kind not in "iub":
            row = row.astype(np.float32)
        index = int(row.argmax())
        if row.dtype.kind == "f" and not row[index] > -np.inf:
            fault = "No valid tokens: every value is -inf" if row[index] == -np.inf else f"NaN at index {index}"
            raise BackendError(f"argmax_last_dim_u32: {fault}; expected at least one value above -inf and no NaN")
        return index


TensorRef: TypeAlias = TensorLike
"""A shared handle; in Python a plain object reference (upstream `Arc<dyn TensorLike>`)."""


class TensorFactory(ABC):
    """Makes tensors.  [TN-FACTORY-1..6]"""

    @abstractmethod
    def empty(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """A tensor to be filled later; the reference fills it with zeros, so results repeat."""

    @abstractmethod
    def zeros_like(self, tensor: TensorRef) -> TensorRef:
        """Zeros of the argument's shape, dtype and device."""

    @abstractmethod
    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        """Flat row-major float32 values, cast to `dtype`. Raises BackendError unless `len(data) == prod(shape)`."""

    @abstractmethod
    def to_device(self, tensor: TensorRef, device: Device) -> TensorRef:
        """As `TensorLike.to_device`."""

    @abstractmethod
    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> TensorRef:
        """`length` entries of axis `dim` from `start`, sharing storage. Raises BackendError when out of range."""

    @abstractmethod
    def reshape(self, tensor: TensorRef, shape: Shape) -> TensorRef:
        """As `TensorLike.reshape`."""

    @abstractmethod
    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """Filled with zero."""

    @abstractmethod
    def ones(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        """Filled with one."""

    @abstractmethod
    def uniform(
        self,
        shape: Shape,
        low: float,
        high: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> TensorRef:
        """Independent draws from U[low, high), then cast. `rng` (extension) or the factory's own seeded generator."""

    @abstractmethod
    def normal(
        self,
        shape: Shape,
        mean: float,
        std: float,
        dtype: DataType,
        device: Device,
        *,
        rng: np.random.Generator | None = None,
    ) -> TensorRef:
        """Independent draws from N(mean, std), then cast; `rng` as in `uniform`. Raises BackendError if std < 0."""

    @abstractmethod
    def from_tensor(self, tensor: TensorRef, device: Device) -> TensorRef:
        """A copy of `tensor` on `device`."""

    @abstractmethod
    def from_numpy(self, array: Array, device: Device | None = None) -> TensorRef:
        """The array as a tensor of its own element type, without a copy where possible (extension).  [TN-FACTORY-3]

        `device=None` means the factory's device. Raises DeviceError for an element type without a DataType
        (64-bit types among them).
        """

    @abstractmethod
    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> TensorRef:
        """Token ids as a UINT32 tensor `[T]`, exact beyond 2**24 (extension, D-13).  [TN-FACTORY-4]

        Raises InvalidParameterError for anything but integers in [0, 2**32).
        """


class TensorOps(ABC):
    """Primitive mathematics. Axes count from 0; only `softmax` takes negative ones.  [TN-OPS-1..11]

    Bad shapes raise BackendError. NaN and infinities follow IEEE 754, without warnings.
    """

    @abstractmethod
    def matmul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a @ b`: `[.., m, k] x [.., k, n] -> [.., m, n]`, leading axes broadcast, ranks at least 2."""

    @abstractmethod
    def add(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a + b`, broadcast (D-51)."""

    @abstractmethod
    def sub(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a - b`, broadcast."""

    @abstractmethod
    def mul(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a * b`, broadcast."""

    @abstractmethod
    def div(self, a: TensorRef, b: TensorRef) -> TensorRef:
        """`a / b`, broadcast; division by zero gives inf or NaN."""

    @abstractmethod
    def softmax(self, tensor: TensorRef, dim: int) -> TensorRef:
        """`exp(x - max) / sum(exp(x - max))` along `dim`; a lane of -inf only gives NaN."""

    @abstractmethod
    def layer_norm(self, input: TensorRef, weight: TensorRef, bias: TensorRef | None, eps: float) -> TensorRef:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, biased variance; no bias means 0."""

    @abstractmethod
    def rms_norm(self, input: TensorRef, weight: TensorRef, eps: float) -> TensorRef:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last axis."""

    @abstractmethod
    def relu(self, tensor: TensorRef) -> TensorRef:
        """`max(x, 0)`; NaN stays NaN."""

    @abstractmethod
    def gelu(self, tensor: TensorRef, *, approximate: str = "none") -> TensorRef:
        """`x * Phi(x)`, the erf form; `approximate="tanh"` (extension) gives the tanh form (D-14)."""

    @abstractmethod
    def silu(self, tensor: TensorRef) -> TensorRef:
        """`x * sigmoid(x)`."""

    @abstractmethod
    def concat(self, tensors: Sequence[TensorRef], dim: int) -> TensorRef:
        """Joined along an existing axis. Raises BackendError for an empty list or other dims that differ."""

    @abstractmethod
    def split(self, tensor: TensorRef, sizes: Sequence[int], dim: int) -> list[TensorRef]:
        """Consecutive pieces along `dim`. Raises BackendError unless the sizes sum to the axis length (D-51)."""

    @abstractmethod
    def transpose(self, tensor: TensorRef, dim0: int, dim1: int) -> TensorRef:
        """Two axes swapped, sharing storage."""

    @abstractmethod
    def permute(self, tensor: TensorRef, dims: Sequence[int]) -> TensorRef:
        """All axes reordered, sharing storage. Raises BackendError unless `dims` is a permutation."""


def matmul_output_shape(a_shape: Sequence[int], b_shape: Sequence[int]) -> list[int]:
    """Shape of `a @ b`: `[.., m, k] x [.., k, n] -> [broadcast(..), m, n]` (D-61). Pure.

    Raises BackendError if a rank is below 2, the k differ, or the leading axes do not broadcast.  [TN-SHAPE-1..2]
    """
    if len(a_shape) < 2 or len(b_shape) < 2:
        raise ShapeError(
            f"matmul: shapes {tuple(a_shape)} and {tuple(b_shape)}, expected ranks of at least 2; reshape vectors first"
        )
    if a_shape[-1] != b_shape[-2]:
        raise ShapeError(
            f"matmul: inner dimensions {a_shape[-1]}, {b_shape[-2]} of {tuple(a_shape)} and {tuple(b_shape)} differ; "
            "transpose one operand or use linear()"
        )
    batch = broadcast_shapes(a_shape[:-2], b_shape[:-2])
    if batch is None:
        raise ShapeError(
            f"matmul: leading axes of {tuple(a_shape)} and {tuple(b_shape)} do not broadcast; expected equal or 1"
        )
    return [*batch, a_shape[-2], b_shape[-1]]


def are_broadcastable(shape1: Sequence[int], shape2: Sequence[int]) -> bool:
    """True when, aligned at the right, dims are equal or one of them is 1; missing dims count as 1 (D-32).

    Pure.  [TN-SHAPE-3]
    """
    return all(a == b or a == 1 or b == 1 for a, b in zip(reversed(shape1), reversed(shape2), strict=False))


def broadcast_shapes(shape1: Sequence[int], shape2: Sequence[int]) -> list[int] | None:
    """The common shape under numpy's rules, or None when there is none (D-32). Pure.  [TN-SHAPE-3..4]

    A dim of 1 takes the other's size, also when that is 0: `(0,)` with `(1,)` gives `[0]`.
    """
    if not are_broadcastable(shape1, shape2):
        return None
    longer, shorter = (shape1, shape2) if len(shape1) >= len(shape2) else (shape2, shape1)
    result = [int(dim) for dim in longer]
    offset = len(longer) - len(shorter)
    for axis, dim in enumerate(shorter):
        if result[offset + axis] == 1:
            result[offset + axis] = int(dim)
    return result
