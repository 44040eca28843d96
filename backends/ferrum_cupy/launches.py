"""Row-wise and element-wise kernels: what they are given, and over what grid.  Clauses: BK-CUPY-7..8."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from ferrum_cupy.machine import STORAGE
from ferrum_cupy.runtime import PACK_BYTES, Runtime, as_integers, packable
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints

THREADS: Final = 256
_WARP: Final = 32


def row_threads(length: int, item_bytes: int) -> int:
    """Threads for one row: a pack each as far as they go, whole warps. Pure."""
    packs = max(1, length * item_bytes // PACK_BYTES)
    return max(_WARP, min(THREADS, -(-packs // _WARP) * _WARP))


def rms_norm(runtime: Runtime, operation: str, x: CupyTensor, weight: object, eps: float) -> CupyTensor:
    """y = x / sqrt(mean(x**2, -1) + eps) * weight; x (..., E), weight (E,). Pure. Raises ShapeError."""
    gain = _gain(runtime, operation, "weight", weight, x)
    data = runtime.machine.xp.ascontiguousarray(x.array)
    y, length = runtime.machine.xp.empty_like(data), x.shape()[-1]
    if data.size:
        arguments = (data, gain, y, np.int32(length), np.float32(eps), packable(length, data, gain, y))
        _rows(runtime, "rms_norm", x, arguments)
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
    y, r, length = runtime.machine.xp.empty_like(data), runtime.machine.xp.empty_like(data), x.shape()[-1]
    if data.size:
        packed = packable(length, data, added, gain, y, r)
        _rows(runtime, operation, x, (data, added, gain, y, r, np.int32(length), np.float32(eps), packed))
    return CupyTensor(runtime.machine, y, x.kind), CupyTensor(runtime.machine, r, x.kind)


def layer_norm(runtime: Runtime, x: CupyTensor, weight: object, bias: object | None, eps: float) -> CupyTensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis, biased variance. Pure. Raises ShapeError."""
    gain = _gain(runtime, "layer_norm", "weight", weight, x)
    shift = None if bias is None else _gain(runtime, "layer_norm", "bias", bias, x)
    data = runtime.machine.xp.ascontiguousarray(x.array)
    y = runtime.machine.xp.empty_like(data)
    if data.size:
        _rows(runtime, "layer_norm", x, (data, gain, shift, y, np.int32(x.shape()[-1]), np.float32(eps)))
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


def pointwise(runtime: Runtime, kernel: str, x: CupyTensor, other: CupyTensor | None = None) -> CupyTensor:
    """`kernel` of every element; with `other`, of every pair in x's type. Pure."""
    xp = runtime.machine.xp
    data = xp.ascontiguousarray(x.array)
    inputs = (data,) if other is None else (data, runtime.same_float(kernel, "up", other, x))
    y = xp.empty_like(data)
    if data.size:
        packed = packable(data.size, *inputs, y)
        count = data.size // (PACK_BYTES // data.itemsize) if packed else data.size
        grid = (-(-count // THREADS), 1, 1)
        defines = {"STORAGE": STORAGE[x.kind]}
        runtime.machine.launch("pointwise", kernel, defines, grid, THREADS, (*inputs, y, np.int64(data.size), packed))
    return CupyTensor(runtime.machine, y, x.kind)


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
    if (cos.kind, sin.kind) != (x.kind, x.kind):
        return _rotary_wide(runtime, x, cos, sin, index)
    data, c, s = (xp.ascontiguousarray(part.array) for part in (x, cos, sin))
    y, half = xp.empty_like(data), table[1]
    packed = packable(half, data, c, s, y)
    rows = shape[0] * shape[1]
    work = rows * shape[2] * half // (PACK_BYTES // data.itemsize if packed else 1)
    arguments = (
        data, c, s, runtime.indices(index), y,
        np.int64(rows), np.int32(shape[1]), np.int32(shape[2]), np.int32(half), packed,
    )  # fmt: skip
    grid = (-(-work // THREADS), 1, 1)
    runtime.machine.launch("pointwise", "rotary", {"STORAGE": STORAGE[x.kind]}, grid, THREADS, arguments)
    return CupyTensor(runtime.machine, y, x.kind)


def _rotary_wide(
    runtime: Runtime,
    x: CupyTensor,
    cos: CupyTensor,
    sin: CupyTensor,
    index: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
) -> CupyTensor:
    """Tables of another type than x: everything in float32, rounded once."""
    xp, rows = runtime.machine.xp, runtime.indices(index)
    c, s = (runtime.wide("rotary_embedding", t)[rows][None, :, None] for t in (cos, sin))
    wide = runtime.wide("rotary_embedding", x)
    a, b = wide[..., : c.shape[-1]], wide[..., c.shape[-1] :]
    return runtime.rounded(xp.concatenate((a * c - b * s, b * c + a * s), -1), x.kind)


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
