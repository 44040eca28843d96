"""Matrix products on a GPU, by cuBLAS: float32 sums, one rounding, no TF32.  Clauses: BK-CUPY-11, BK-CUPY-52."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import cupy
import numpy as np

from ferrum_cupy.machine import DeviceArray
from ferrum_cupy.storage import ARRAY_TYPES
from ferrum_ref.errors import BackendError, UnsupportedError
from ferrum_ref.types.devices import DataType

_CUDA_R_32F, _CUDA_R_16F, _CUDA_R_16BF = 0, 2, 14
_CUBLAS_TYPES: Final = {DataType.FP32: _CUDA_R_32F, DataType.FP16: _CUDA_R_16F, DataType.BF16: _CUDA_R_16BF}
_COMPUTE_32F, _COMPUTE_32F_PEDANTIC, _GEMM_DEFAULT = 68, 69, -1
_DEFAULT_MATH, _ONE_ROUNDING = 0, 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: partial sums stay float32
_AS_STORED, _TRANSPOSED = 0, 1  # CUBLAS_OP_N, CUBLAS_OP_T
Factor = tuple[DeviceArray, int, int, int]


class Products:
    """cuBLAS of one GPU, which must be the current one."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._scalars = np.array([1.0, 0.0], np.float32)
        self._one = int(self._scalars.ctypes.data)
        self._zero = self._one + self._scalars.itemsize

    @cached_property
    def _cublas(self) -> Any:
        """CuPy's binding. Raises UnsupportedError where the library is not installed."""
        try:
            from cupy_backends.cuda.libs import cublas
        except ImportError as error:
            raise UnsupportedError(
                f"linear: cuBLAS does not load ({str(error).splitlines()[0]}); install it: pip install nvidia-cublas"
            ) from error
        return cublas

    def multiply(self, a: DeviceArray, b: DeviceArray, dtype: DataType, *, is_rounded: bool = False) -> DeviceArray:
        """See `Machine.multiply`; one call, b read as it lies."""
        (rows, inner), columns = a.shape, b.shape[0]
        out = cupy.empty((rows, columns), ARRAY_TYPES[dtype] if is_rounded else np.float32)
        if out.size and inner:
            a, b = cupy.ascontiguousarray(a), cupy.ascontiguousarray(b)
            sizes = (rows, columns, inner, 1)
            self._run(out, sizes, (a, _AS_STORED, inner, 0), (b, _TRANSPOSED, inner, 0), dtype)
        elif out.size:
            out.fill(0)
        return out

    def multiply_many(self, a: DeviceArray, b: DeviceArray, dtype: DataType) -> DeviceArray:
        """See `Machine.multiply_many`; one call, matrices read as they lie where they are whole or transposed."""
        (rows, inner), columns = a.shape[1:], b.shape[2]
        count = a.shape[0] if b.shape[0] == 1 else b.shape[0]
        out = cupy.empty((count, rows, columns), ARRAY_TYPES[dtype])
        if out.size and inner:
            self._run(out, (rows, columns, inner, count), _factor(a), _factor(b), dtype)
        elif out.size:
            out.fill(0)
        return out

    def _run(self, out: DeviceArray, sizes: tuple[int, int, int, int], a: Factor, b: Factor, dtype: DataType) -> None:
        """cuBLAS counts columns first: what it is told to compute is out^T = b^T a^T, from the same memory."""
        cublas, (rows, columns, inner, count) = self._cublas, sizes
        kind, is_narrow = _CUBLAS_TYPES[dtype], out.dtype != np.float32
        kept = kind if is_narrow else _CUDA_R_32F
        compute = _COMPUTE_32F_PEDANTIC if dtype is DataType.FP32 else _COMPUTE_32F
        (left, left_read, left_row, left_step), (right, right_read, right_row, right_step) = a, b
        handle = self._device.cublas_handle
        try:
            cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
            cublas.setMathMode(handle, _ONE_ROUNDING if is_narrow else _DEFAULT_MATH)
            if count == 1:
                cublas.gemmEx(
                    handle, right_read, left_read, columns, rows, inner, self._one,
                    right.data.ptr, kind, right_row, left.data.ptr, kind, left_row, self._zero,
                    out.data.ptr, kept, columns, compute, _GEMM_DEFAULT,
                )  # fmt: skip
            else:
                cublas.gemmStridedBatchedEx(
                    handle, right_read, left_read, columns, rows, inner, self._one,
                    right.data.ptr, kind, right_row, right_step, left.data.ptr, kind, left_row, left_step, self._zero,
                    out.data.ptr, kept, columns, rows * columns, count, compute, _GEMM_DEFAULT,
                )  # fmt: skip
        except cublas.CUBLASError as error:
            given = f"{count} times ({rows}, {inner}) by ({inner}, {columns})"
            raise BackendError(f"multiply: cuBLAS refuses {given}: {error}") from error
        finally:
            cublas.setMathMode(handle, _DEFAULT_MATH)  # the handle is CuPy's, too


def _factor(matrices: DeviceArray) -> Factor:
    """(C, M, N) as (array, how cuBLAS reads it, elements from row to row, from matrix to matrix); else of a copy."""
    count, rows, columns = matrices.shape
    step = 0 if count == 1 else rows * columns
    if _lies(matrices, (rows * columns, columns, 1)):
        return matrices, _AS_STORED, columns, step
    if _lies(matrices, (rows * columns, 1, rows)):
        return matrices, _TRANSPOSED, rows, step
    return cupy.ascontiguousarray(matrices), _AS_STORED, columns, step


def _lies(array: DeviceArray, steps: tuple[int, int, int]) -> bool:
    """Whether neighbours on each axis lie so many elements apart. Pure."""
    apart = zip(array.shape, array.strides, steps, strict=True)
    return all(length == 1 or stride == step * array.itemsize for length, stride, step in apart)
