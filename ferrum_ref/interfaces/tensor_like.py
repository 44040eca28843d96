"""The tensor handle itself.   Clauses: TN-LIKE-* in specs/tensor.md."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, ModelError, ShapeError, UnsupportedError
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode

Shape: TypeAlias = tuple[int, ...]
Array: TypeAlias = NDArray[Any]


@runtime_checkable
class TensorLike(Protocol):
    """An n-dimensional array on some device; immutable by convention.  [TN-LIKE-1..13]

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

        FP16 is `float16`; BF16, FP8, INT4 and UINT4 are the types of `ml_dtypes`.  [TN-LIKE-11]
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

    def to_vec_f32(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> NDArray[np.float32]:
        """All elements, flat in row-major order, as a float32 copy (D-12).  [TN-LIKE-7]

        UPSTREAM: one row only, as `last_row_f32` (ranks 0 to 3).
        Raises ModelError without host access; UnsupportedError for UPSTREAM and a rank above 3.
        """
        if parity_mode is ParityMode.UPSTREAM:
            if self.ndim() > 3:
                raise UnsupportedError(
                    f"to_vec_f32: parity_mode UPSTREAM for shape {self.shape()}, expected a rank of at most 3; "
                    "upstream's result is not recorded beyond that"
                )
            return last_row_f32(self)
        return _float32(self.to_numpy()).reshape(-1)

    def to_vec_u32(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> list[int]:
        """All elements, flat in row-major order, as Python ints in [0, 2**32) (D-13).  [TN-LIKE-8]

        UPSTREAM: floats are cut toward zero and clipped to [0, 2**32), NaN is 0, as Rust's `as u32` does.
        Raises ModelError without host access; InvalidParameterError on a value that is not such an integer.
        """
        flat = np.asarray(self.to_numpy()).reshape(-1)
        if flat.dtype.kind not in "iub":
            flat = _quiet(flat, np.float64)
        if parity_mode is ParityMode.UPSTREAM and flat.dtype.kind == "f":
            flat = np.trunc(np.clip(np.nan_to_num(flat, nan=0.0), 0, 2**32 - 1))
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
            row = _float32(row)
        index = int(row.argmax())
        if row.dtype.kind == "f" and not row[index] > -np.inf:
            fault = "No valid tokens: every value is -inf" if row[index] == -np.inf else f"NaN at index {index}"
            raise BackendError(f"argmax_last_dim_u32: {fault}; expected at least one value above -inf and no NaN")
        return index


TensorRef: TypeAlias = TensorLike
"""A shared handle; in Python a plain object reference (upstream `Arc<dyn TensorLike>`)."""


def last_row_f32(tensor: TensorRef) -> NDArray[np.float32]:
    """One row of the last axis as float32: batch entry 0, last position of every axis between (D-12).  [TN-LIKE-12]

    Rank 0 and 1: everything. Rank 2 `[B, V]`: row 0. Rank 3 and more `[B, ..., T, V]`: entry `[0, -1, ..., -1]`. Pure.
    Raises ModelError without host access; BackendError where an axis before the last is empty.
    """
    values = np.asarray(tensor.to_numpy())
    if values.ndim > 1:
        if 0 in values.shape[:-1]:
            raise ShapeError(f"last_row_f32: shape {values.shape} has no row; expected every axis but the last above 0")
        values = values[(0,) + (-1,) * (values.ndim - 2)]
    return _float32(values).reshape(-1)


def _float32(values: Array) -> NDArray[np.float32]:
    """A float32 copy, without a warning for the signalling NaNs that any bytes may hold."""
    return _quiet(values, np.float32)


def _quiet(values: Array, dtype: type[np.generic]) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array(values, dtype=dtype)
