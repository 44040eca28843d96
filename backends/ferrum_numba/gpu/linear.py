"""Matrix products, packed weights and the embedding table.   Clauses: BK-NCUDA-13..14 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math

import numpy as np

from ferrum_numba.gpu.casting import cast_float
from ferrum_numba.gpu.integers import IntArray, as_integers, check_below
from ferrum_numba.gpu.kernels.copy import copy_rows
from ferrum_numba.gpu.kernels.gemm import SIDE, TILE, gemm
from ferrum_numba.gpu.kernels.gemv import ROWS, WARPS, gemv
from ferrum_numba.gpu.kernels.weights import BLOCK, DENSE, Q4_0, Q4_WORDS, Q8_0, Q8_WORDS, Weights
from ferrum_numba.gpu.machine import DeviceArray
from ferrum_numba.gpu.operands import fitting
from ferrum_numba.gpu.storage import BITS, carrier, common_type, storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import Ints, QuantScheme
from ferrum_ref.interfaces.tensor import matmul_output_shape
from ferrum_ref.types.devices import DataType


def linear(x: NumbaTensor, weight: NumbaTensor) -> NumbaTensor:
    """y = x @ weight.T; x (..., in) of rank >= 1, weight (out, in); result in x's type. Pure. Raises ShapeError."""
    if weight.ndim() != 2 or x.ndim() < 1 or x.shape()[-1] != weight.shape()[1]:
        raise ShapeError(
            f"linear: input {x.shape()} and weight {weight.shape()}, expected (..., in) and (out, in); "
            "weights are stored output first"
        )
    weight = fitting("linear", x, weight)
    words = weight.flat()
    return _product("linear", x, DENSE[storage_of(weight.dtype(), "linear")], words, words, weight.shape()[0])


def quantized_linear(x: NumbaTensor, packed: NumbaTensor, scheme: QuantScheme) -> NumbaTensor:
    """The same with weights in ggml's blocks of 32, unpacked to float32 where they are used. Pure.

    Raises UnsupportedError for groups other than 32; ShapeError for other shapes or element types.
    """
    if not isinstance(scheme, QuantScheme.Q4_0 | QuantScheme.Q8_0) or scheme.group_size != BLOCK:
        raise UnsupportedError(
            f"quantized_linear: scheme: got {scheme}, expected Q4_0 or Q8_0 with group_size={BLOCK}, "
            "ggml's blocks; dequantise and call linear"
        )
    weights, words = (Q4_0, Q4_WORDS) if isinstance(scheme, QuantScheme.Q4_0) else (Q8_0, Q8_WORDS)
    shape = packed.shape()
    if (
        packed.dtype() is not DataType.UINT8
        or len(shape) != 2
        or x.ndim() < 1
        or shape[1] * BLOCK != x.shape()[-1] * words * 2
    ):
        raise ShapeError(
            f"quantized_linear: input {x.shape()} and packed_weight {shape} of {packed.dtype()}, "
            f"expected (..., in) and uint8 (out, in/{BLOCK}*{words * 2})"
        )
    data = packed.flat() if packed.numel() else packed.runtime.machine.upload(np.zeros(2, np.uint8))
    return _product("quantized_linear", x, weights, data.view(np.uint16), data.view(np.float16), shape[0])


def embedding(table: NumbaTensor, ids: Ints) -> NumbaTensor:
    """Rows table[ids], bit for bit; table (V, E). Pure. Raises ShapeError; InvalidParameterError for an id outside."""
    if table.ndim() != 2:
        raise ShapeError(f"embedding: table {table.shape()}, expected (V, E)")
    index = as_integers("embedding", "ids", ids)
    num_rows, length = table.shape()
    check_below("embedding", "ids", index, num_rows, "the tokenizer and the model disagree")
    result = NumbaTensor.empty(table.runtime, (len(index), length), table.dtype())
    move_rows(table.flat(), result.array, index, np.arange(len(index)), length, table)
    return result


def move_rows(
    source: DeviceArray, target: DeviceArray, of: IntArray, to: IntArray, length: int, like: NumbaTensor
) -> None:
    """Row to[i] of target = row of[i] of source, rows of `length` elements of like's type, bit for bit."""
    bits, runtime, count = BITS[carrier(like.dtype()).itemsize], like.runtime, len(of) * length
    if count:
        arrays = (source.view(bits), target.view(bits), runtime.integers(of), runtime.integers(to))
        runtime.launch_each(copy_rows, (bits,), count, *arrays, length, count)


def matmul(a: NumbaTensor, b: NumbaTensor) -> NumbaTensor:
    """a @ b: [.., m, k] x [.., k, n] -> [.., m, n] in the common type; leading axes broadcast. Pure."""
    shape = tuple(matmul_output_shape(a.shape(), b.shape()))
    target = common_type("matmul", a.dtype(), b.dtype())
    kind = storage_of(target, "matmul")
    result = NumbaTensor.empty(a.runtime, shape, target)
    (num_rows, num_columns), depth, leading = shape[-2:], a.shape()[-1], shape[:-2]
    if result.numel():
        swapped = b.permuted((*range(b.ndim() - 2), b.ndim() - 1, b.ndim() - 2))
        left = cast_float(a, target).broadcast((*leading, num_rows, depth)).flat()
        right = cast_float(swapped.contiguous(), target).broadcast((*leading, num_columns, depth)).flat()
        grid = (-(-num_columns // TILE), -(-num_rows // TILE), math.prod(leading))
        sizes = (num_rows, num_columns, depth)
        a.runtime.launch(gemm, (kind, DENSE[kind]), grid, (SIDE, SIDE, 1), left, right, right, result.array, *sizes)
    return result


def _product(
    operation: str, x: NumbaTensor, weights: Weights, words: DeviceArray, scales: DeviceArray, num_columns: int
) -> NumbaTensor:
    """x @ W.T by the kernel that fits the number of rows."""
    kind = storage_of(x.dtype(), operation)
    depth = x.shape()[-1]
    num_rows = math.prod(x.shape()[:-1])
    result = NumbaTensor.empty(x.runtime, (*x.shape()[:-1], num_columns), x.dtype())
    if result.numel():
        arguments = (x.flat(), words, scales, result.array, num_rows, num_columns, depth)
        if num_rows <= x.runtime.tuning.gemv_rows:
            grid = (-(-num_columns // WARPS), -(-num_rows // ROWS), 1)
            x.runtime.launch(gemv, (kind, weights), grid, (WARPS * 32, 1, 1), *arguments)
        else:
            grid = (-(-num_columns // TILE), -(-num_rows // TILE), 1)
            x.runtime.launch(gemm, (kind, weights), grid, (SIDE, SIDE, 1), *arguments)
    return result
