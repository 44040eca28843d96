"""Row-wise and element-wise kernels: what they are given, and over what grid.  Clauses: BK-CUPY-7..8."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from ferrum_cupy.machine import STORAGE, DeviceArray
from ferrum_cupy.runtime import PACK_BYTES, Runtime, as_integers, packable
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints
from ferrum_ref.types.devices import DataType

THREADS: Final = 256
MOST_THREADS: Final = 1024
_WARP: Final = 32
_WARP_ROW_BYTES: Final = 32 * 4 * PACK_BYTES  # what the registers of one warp hold of a row: HELD packs a lane


def row_threads(length: int, item_bytes: int) -> int:
    """Threads for one row: whole warps, two packs each as far as they go. Pure."""
    packs = max(1, length * item_bytes // PACK_BYTES)
    return max(_WARP, min(MOST_THREADS, -(-packs // (2 * _WARP)) * _WARP))


def rms_norm(runtime: Runtime, operation: str, x: CupyTensor, weight: object, eps: float) -> CupyTensor:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight; x (..., E), weight (E,). Pure. Raises ShapeError."""
    gain = _gain(runtime, operation, "weight", weight, x)
    data = runtime.machine.xp.ascontiguousarray(x.array)
    y = runtime.machine.xp.empty_like(data)
    if data.size:
        _norm_rows(runtime, "rms_norm", x, (data, gain, y), np.float32(eps))
    return CupyTensor(runtime.machine, y, x.kind)


def rms_norm_residual(
    runtime: Runtime, x: CupyTensor, residual: object, weight: object, eps: float
) -> tuple[CupyTensor, CupyTensor]:
    """r = x + residual; (rms_norm(r, weight, eps), r), the norm reading r before it is rounded. Pure."""
    operation = "rms_norm_residual"
    other = runtime.float_of(operation, "residual", residual)
    if x.shape() != other.shape():
        raise ShapeError(f"{operation}: input {x.shape()} and residual {other.shape()}, expected equal shapes")
    gain = _gain(runtime, operation, "weight", weight, x)
    data = runtime.machine.xp.ascontiguousarray(x.array)
    added = runtime.same_float(operation, "residual", other, x)
    y, r = runtime.machine.xp.empty_like(data), runtime.machine.xp.empty_like(data)
    if data.size:
        _norm_rows(runtime, operation, x, (data, added, gain, y, r), np.float32(eps))
    return CupyTensor(runtime.machine, y, x.kind), CupyTensor(runtime.machine, r, x.kind)


def layer_norm(runtime: Runtime, x: CupyTensor, weight: object, bias: object | None, eps: float) -> CupyTensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis, biased variance. Pure. Raises ShapeError."""
    gain = _gain(runtime, "layer_norm", "weight", weight, x)
    shift = None if bias is None else _gain(runtime, "layer_norm", "bias", bias, x)
    data = runtime.machine.xp.ascontiguousarray(x.array)
    y = runtime.machine.xp.empty_like(data)
    if data.size:
        arrays = (data, gain, y) if shift is None else (data, gain, shift, y)
        sizes = (np.int32(x.shape()[-1]), np.float32(eps), packable(x.shape()[-1], *arrays))
        _rows(runtime, "layer_norm", x, (data, gain, shift, y, *sizes))
    return CupyTensor(runtime.machine, y, x.kind)


def softmax(runtime: Runtime, x: CupyTensor, dim: int) -> CupyTensor:
    """exp(x - max) / sum(exp(x - max)) along `dim`, which may be negative. Pure. Raises ShapeError."""
    rank = len(x.shape())
    if not -rank <= dim < rank:
        raise ShapeError(f"softmax: dim: got {dim} for shape {x.shape()}, expected {-rank} <= dim < {rank}")
    xp = runtime.machine.xp
    data = xp.ascontiguousarray(xp.moveaxis(x.array, dim, -1))
    y = xp.empty_like(data)
    if data.size:
        last = CupyTensor(runtime.machine, data, x.kind)
        _rows(runtime, "softmax", last, (data, y, np.int32(data.shape[-1])))
    return CupyTensor(runtime.machine, xp.ascontiguousarray(xp.moveaxis(y, -1, dim)), x.kind)


def pairwise(runtime: Runtime, kernel: str, x: DeviceArray, other: DeviceArray, kind: DataType) -> DeviceArray:
    """`kernel` of every pair of two arrays of one float type, broadcast against each other. Pure."""
    xp = runtime.machine.xp
    shape = np.broadcast_shapes(x.shape, other.shape)
    pair = tuple(xp.ascontiguousarray(xp.broadcast_to(array, shape)) for array in (x, other))
    y = xp.empty(shape, pair[0].dtype)
    if y.size:
        _elements(runtime, kernel, kind, (*pair, y))
    return y


def pointwise(runtime: Runtime, kernel: str, x: CupyTensor, other: CupyTensor | None = None) -> CupyTensor:
    """`kernel` of every element; with `other`, of every pair in x's type. Pure."""
    xp = runtime.machine.xp
    data = xp.ascontiguousarray(x.array)
    inputs = (data,) if other is None else (data, runtime.same_float(kernel, "up", other, x))
    y = xp.empty_like(data)
    if data.size:
        _elements(runtime, kernel, x.kind, (*inputs, y))
    return CupyTensor(runtime.machine, y.reshape(x.shape()), x.kind)


def rotary(runtime: Runtime, x: CupyTensor, cos_cache: object, sin_cache: object, positions: Ints) -> CupyTensor:
    """Rotate pair (i, i + D/2) of every head by its token's own angle (D-15); x (B, T, H, D), tables (P, D/2). Pure.

    Raises ShapeError for other shapes; InvalidParameterError for a position outside [0, P).
    """
    operation = "rotary_embedding"
    cos, sin = (
        runtime.float_of(operation, name, t) for name, t in (("cos_cache", cos_cache), ("sin_cache", sin_cache))
    )
    shape, table = x.shape(), cos.shape()
    if len(shape) != 4 or len(table) != 2 or table != sin.shape() or shape[3] != 2 * table[1]:
        raise ShapeError(
            f"{operation}: x {shape}, cos_cache {table}, sin_cache {sin.shape()}; "
            "expected (B, T, H, D) and tables (P, D/2)"
        )
    index = as_integers(operation, "position_ids", positions)
    if len(index) != shape[1]:
        raise ShapeError(f"{operation}: {len(index)} position_ids for {shape[1]} tokens, expected one for each")
    xp = runtime.machine.xp
    if x.array.size == 0:
        return CupyTensor(runtime.machine, xp.empty_like(x.array), x.kind)
    if not 0 <= int(index.min()) <= int(index.max()) < table[0]:
        bad = index[(index < 0) | (index >= table[0])]
        raise InvalidParameterError(
            f"{operation}: position_ids: got {int(bad[0])}, expected 0 <= position < {table[0]}; "
            "build longer tables or shorten the sequence"
        )
    data = xp.ascontiguousarray(x.array)
    y, half, rows = xp.empty_like(data), table[1], shape[0] * shape[1]
    is_same = (cos.kind, sin.kind) == (x.kind, x.kind)
    c, s = (xp.ascontiguousarray(t.array if is_same else runtime.wide(operation, t)) for t in (cos, sin))
    arguments = (
        data, c, s, runtime.indices(index), y, np.int64(rows), np.int32(shape[1]), np.int32(shape[2]), np.int32(half),
    )  # fmt: skip
    work, defines = rows * shape[2] * half, {"STORAGE": STORAGE[x.kind]}
    if not is_same:  # tables of another type than x: in float32, which holds them all
        runtime.machine.launch("pointwise", "rotary_wide", defines, (-(-work // THREADS), 1, 1), THREADS, arguments)
        return CupyTensor(runtime.machine, y, x.kind)
    packed = packable(half, data, c, s, y)
    work //= PACK_BYTES // data.itemsize if packed else 1
    grid = (-(-work // THREADS), 1, 1)
    runtime.machine.launch("pointwise", "rotary", defines, grid, THREADS, (*arguments, packed))
    return CupyTensor(runtime.machine, y, x.kind)


def _gain(runtime: Runtime, operation: str, name: str, tensor: object, x: CupyTensor) -> object:
    """A weight of the last axis, in x's type. Raises ShapeError."""
    found, shape = runtime.float_of(operation, name, tensor), x.shape()
    if not shape or found.shape() != shape[-1:]:
        raise ShapeError(f"{operation}: input {shape} and {name} {found.shape()}, expected (..., E) and (E,)")
    return runtime.same_float(operation, name, found, x)


def _rows(runtime: Runtime, kernel: str, x: CupyTensor, arguments: tuple[object, ...]) -> None:
    shape = x.shape()
    grid = (math.prod(shape[:-1]), 1, 1)
    threads = row_threads(shape[-1], x.array.itemsize)
    runtime.machine.launch("norms", kernel, {"STORAGE": STORAGE[x.kind]}, grid, threads, arguments)


def _norm_rows(runtime: Runtime, kernel: str, x: CupyTensor, arrays: tuple[DeviceArray, ...], eps: np.float32) -> None:
    """A block a row, or a warp a row where rows are short and lie on 16-byte addresses."""
    length, packed = x.shape()[-1], packable(x.shape()[-1], *arrays)
    if not packed or length * x.array.itemsize > _WARP_ROW_BYTES:
        _rows(runtime, kernel, x, (*arrays, np.int32(length), eps, packed))
        return
    rows = math.prod(x.shape()[:-1])
    grid, defines = (-(-rows // (THREADS // _WARP)), 1, 1), {"STORAGE": STORAGE[x.kind]}
    arguments = (*arrays, np.int64(rows), np.int32(length), eps)
    runtime.machine.launch("norms", f"{kernel}_rows", defines, grid, THREADS, arguments)


def _elements(runtime: Runtime, kernel: str, kind: DataType, arrays: tuple[DeviceArray, ...]) -> None:
    """Over contiguous arrays of one size, a thread a pack or an element."""
    size, packed = arrays[0].size, packable(arrays[0].size, *arrays)
    count = size // (PACK_BYTES // arrays[0].itemsize) if packed else size
    grid, defines = (-(-count // THREADS), 1, 1), {"STORAGE": STORAGE[kind]}
    runtime.machine.launch("pointwise", kernel, defines, grid, THREADS, (*arrays, np.int64(size), packed))
