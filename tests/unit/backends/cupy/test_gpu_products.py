"""What cuBLAS is asked to do, by a stand-in that does it: column-major products over raw memory."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

from ferrum_cupy import gpu_products

from ferrum_ref.errors import BackendError
from ferrum_ref.types.devices import DataType

TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(np.uint16)}
KINDS = {DataType.FP32: np.float32, DataType.FP16: np.float16, DataType.BF16: np.uint16}

UNWRITTEN = {"f": np.nan, "u": 0xFFFF}  # a NaN of BF16


class Array(np.ndarray[Any, Any]):
    """numpy's with CuPy's `data.ptr`."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


class Refused(Exception):
    pass


class Blas:
    """gemmEx and gemmStridedBatchedEx as cuBLAS documents them; `calls` notes the number of products of each."""

    CUBLAS_POINTER_MODE_HOST = 0
    CUBLASError = Refused

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.pointer_mode, self.math_mode = 1, 0

    def setPointerMode(self, handle: int, mode: int) -> None:
        self.pointer_mode = mode

    def setMathMode(self, handle: int, mode: int) -> None:
        self.math_mode = mode

    def gemmEx(self, handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, *given: int) -> None:
        a, at, lda, b, bt, ldb, beta, c, ct, ldc, compute, _ = given
        self.calls.append((1, compute))
        self._product(ta, tb, m, n, k, alpha, beta, (a, at, lda), (b, bt, ldb), (c, ct, ldc))

    def gemmStridedBatchedEx(self, handle: int, ta: int, tb: int, m: int, n: int, k: int, *given: int) -> None:
        alpha, a, at, lda, sa, b, bt, ldb, sb, beta, c, ct, ldc, sc, count, compute, _ = given
        self.calls.append((count, compute))
        for i in range(count):
            a_at, b_at, c_at = (
                start + i * step * TYPES[kind].itemsize for start, step, kind in ((a, sa, at), (b, sb, bt), (c, sc, ct))
            )
            self._product(ta, tb, m, n, k, alpha, beta, (a_at, at, lda), (b_at, bt, ldb), (c_at, ct, ldc))

    def _product(self, ta: int, tb: int, m: int, n: int, k: int, alpha: int, beta: int, *stored: Any) -> None:
        if self.pointer_mode != 0:
            raise Refused("CUBLAS_STATUS_INVALID_VALUE")
        scale, kept = (ctypes.c_float.from_address(at).value for at in (alpha, beta))
        shapes = ((k, m) if ta else (m, k), (n, k) if tb else (k, n), (m, n))
        a, b, c = (_columns(*part, *shape) for part, shape in zip(stored, shapes, strict=True))
        if self.math_mode != (0 if c.dtype == np.float32 else 16):  # partial sums would be rounded to 16 bits
            raise Refused("CUBLAS_STATUS_NOT_SUPPORTED")
        product = scale * (_wide(a.T if ta else a) @ _wide(b.T if tb else b))
        assert kept == 0
        c[...] = _stored(product, c.dtype)


def _columns(address: int, kind: int, leading: int, rows: int, columns: int) -> Any:
    """A column-major matrix at an address: a view that writes go through."""
    if leading < max(1, rows):
        raise Refused("CUBLAS_STATUS_INVALID_VALUE")
    count = leading * (columns - 1) + rows
    memory = (ctypes.c_uint8 * (count * TYPES[kind].itemsize)).from_address(address)
    flat = np.frombuffer(memory, TYPES[kind])
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (flat.itemsize, leading * flat.itemsize))


def _wide(array: Any) -> Any:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def _stored(values: Any, dtype: Any) -> Any:
    """Rounded once; uint16 holds BF16."""
    if dtype == np.uint16:
        return values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(dtype)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Any:
    copies: list[Any] = []

    def contiguous(array: Any) -> Any:
        if not array.flags.c_contiguous:
            copies.append(array.shape)
        return np.ascontiguousarray(array).view(Array)

    cupy = SimpleNamespace(
        empty=lambda shape, kind: np.full(shape, UNWRITTEN[np.dtype(kind).kind], kind).view(Array),
        ascontiguousarray=contiguous,
    )
    monkeypatch.setattr(gpu_products, "cupy", cupy)
    made: Any = gpu_products.Products(SimpleNamespace(cublas_handle=5))
    made._cublas = Blas()
    made.copies = copies
    return made


def drawn(shape: tuple[int, ...], kind: DataType) -> Any:
    """Small whole numbers, exact in every type, so that products and sums are."""
    values = np.random.default_rng(sum(shape)).integers(-8, 9, shape)
    if kind is DataType.BF16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(Array)
    return values.astype(KINDS[kind]).view(Array)


@pytest.mark.clause("BK-CUPY-52", "BK-CUPY-11")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 5, 2), (1, 4, 7), (6, 1, 1), (1, 1, 1)])
def test_one_product_after_another_is_one_call(
    products: Any, kind: DataType, rows: int, inner: int, columns: int
) -> None:
    """Every way in which operands may lie: whole, transposed, one for all; only the first two are not copied."""
    for count, ours in ((1, 1), (4, 4), (4, 1)):
        for a, b in ((count, ours), (ours, count)):
            left, right = drawn((a, rows, inner), kind), drawn((b, inner, columns), kind)
            turned_left = drawn((a, inner, rows), kind).swapaxes(1, 2)
            turned_right = drawn((b, columns, inner), kind).swapaxes(1, 2)
            for x in (left, turned_left):
                for y in (right, turned_right):
                    before = len(products._cublas.calls)
                    found = products.multiply_many(x, y, kind)
                    assert np.array_equal(found, _stored(_wide(x) @ _wide(y), np.dtype(KINDS[kind])))
                    assert found.dtype == KINDS[kind]
                    assert products._cublas.math_mode == 0
                    compute = 69 if kind is DataType.FP32 else 68
                    assert products._cublas.calls[before:] == [(max(a, b), compute)]
    assert products.copies == []


@pytest.mark.clause("BK-CUPY-52")
def test_what_lies_otherwise_is_copied(products: Any) -> None:
    every_other = drawn((3, 4, 10), DataType.FP16)[:, :, ::2]
    right = drawn((3, 5, 2), DataType.FP16)
    assert np.array_equal(products.multiply_many(every_other, right, DataType.FP16), _wide(every_other) @ _wide(right))
    apart = drawn((6, 5, 2), DataType.FP16)[::2]
    assert np.array_equal(products.multiply_many(every_other, apart, DataType.FP16), _wide(every_other) @ _wide(apart))
    assert products.copies == [(3, 4, 5), (3, 4, 5), (3, 5, 2)]


@pytest.mark.clause("BK-CUPY-11", "BK-CUPY-52")
def test_rows_times_weights(products: Any) -> None:
    for kind in KINDS:
        x, w = drawn((3, 6), kind), drawn((5, 6), kind)
        assert np.array_equal(products.multiply(x, w, kind), _wide(x) @ _wide(w).T)
        rounded = products.multiply(x, w, kind, is_rounded=True)
        assert np.array_equal(rounded, _stored(_wide(x) @ _wide(w).T, np.dtype(KINDS[kind])))
        assert np.array_equal(products.multiply(x[:0], w, kind), np.zeros((0, 5)))
        assert np.array_equal(products.multiply(x[:, :0], w[:, :0], kind), np.zeros((3, 5)))
        assert np.array_equal(products.multiply_many(x[None, :, :0], w[None, :0], kind), np.zeros((1, 3, 6)))
    assert len(products._cublas.calls) == 6


@pytest.mark.clause("BK-CUPY-46")
def test_what_cublas_refuses_is_told(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blas, "setPointerMode", lambda *_: None)
    x = drawn((2, 3, 3), DataType.FP32)
    products._cublas.math_mode = 5
    with pytest.raises(BackendError, match=r"multiply: cuBLAS refuses 2 times \(3, 3\) by \(3, 3\): CUBLAS_STATUS"):
        products.multiply_many(x, x, DataType.FP32)
    assert products._cublas.math_mode == 0  # as CuPy left it
