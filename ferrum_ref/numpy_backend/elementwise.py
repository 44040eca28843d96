"""Arithmetic on two arrays with broadcasting and one rounding.   Clauses: TN-OPS-2..4, TN-DTYPE-2."""

from __future__ import annotations

import numpy as np

from ferrum_ref.errors import ShapeError
from ferrum_ref.interfaces.tensor import Array
from ferrum_ref.kernels.rounding import FLOAT32, FLOAT64, DType, round_to
from ferrum_ref.numpy_backend.dtypes import common_type, is_float


def add(a: Array, b: Array) -> Array:
    return _apply("add", np.add, a, b)


def sub(a: Array, b: Array) -> Array:
    return _apply("sub", np.subtract, a, b)


def mul(a: Array, b: Array) -> Array:
    return _apply("mul", np.multiply, a, b)


def div(a: Array, b: Array) -> Array:
    """The quotient; of two integers in FP32."""
    return _apply("div", np.true_divide, a, b)


def _apply(operation: str, function: np.ufunc, a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        try:
            if a.dtype == FLOAT32 and b.dtype == FLOAT32:
                return np.asarray(function(a, b))
            target = common_type(operation, a.dtype, b.dtype)
            if not is_float(target):
                if operation != "div":
                    return np.asarray(function(a, b, dtype=target))
                target = FLOAT32
            compute = FLOAT32 if is_float(a.dtype) and is_float(b.dtype) else FLOAT64
            return round_to(np.asarray(function(_as(a, compute), _as(b, compute))), target)
        except ValueError:
            raise ShapeError(
                f"{operation}: shapes {a.shape} and {b.shape} do not broadcast; "
                "aligned at the right, dims must be equal or 1"
            ) from None


def _as(array: Array, dtype: DType) -> Array:
    return array.astype(dtype, copy=False)
