"""Matrix products, packed weights and the embedding table.   Clauses: BK-NCUDA-13..14 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ferrum_numba.gpu.casting import cast_float
from ferrum_numba.gpu.integers import IntArray, as_integers, check_below
from ferrum_numba.gpu.kernels import gemv, packed_gemv
from ferrum_numba.gpu.kernels.copy import copy_rows
from ferrum_numba.gpu.kernels.gemm import SIDE, TILE, gemm
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
    (product,) = products([(a, b)], product_shape(a, b))
    return product


@dataclass(frozen=True, slots=True)
class ProductShape:
    """What matrix products must have in common to be one launch."""

    leading: tuple[int, ...]
    num_rows: int
    num_columns: int
    depth: int
    data_type: DataType


def product_shape(a: NumbaTensor, b: NumbaTensor) -> ProductShape:
    """That of a @ b. Pure. Raises BackendError for shapes that do not fit and operands that are no floats."""
    *leading, num_rows, num_columns = matmul_output_shape(a.shape(), b.shape())
    target = common_type("matmul", a.dtype(), b.dtype())
    return ProductShape(tuple(leading), num_rows, num_columns, a.shape()[-1], target)


def products(pairs: Sequence[tuple[NumbaTensor, NumbaTensor]], shape: ProductShape) -> list[NumbaTensor]:
    """a @ b of each pair, all of this shape, by one launch; the results lie in one piece of memory. Pure."""
    target, runtime = shape.data_type, pairs[0][0].runtime
    kind = storage_of(target, "matmul")
    one = (*shape.leading, shape.num_rows, shape.num_columns)
    result = NumbaTensor.empty(runtime, (len(pairs), *one), target)
    if result.numel():
        left = [cast_float(a, target).broadcast((*shape.leading, shape.num_rows, shape.depth)) for a, _ in pairs]
        right = [_turned(b, target).broadcast((*shape.leading, shape.num_columns, shape.depth)) for _, b in pairs]
        grid = (-(-shape.num_columns // TILE), -(-shape.num_rows // TILE), len(pairs) * math.prod(shape.leading))
        arrays, sizes = (_in_one_piece(left), _in_one_piece(right)), (shape.num_rows, shape.num_columns, shape.depth)
        arguments = (arrays[0], arrays[1], arrays[1], result.array, *sizes)
        runtime.launch(gemm, (kind, DENSE[kind]), grid, (SIDE, SIDE, 1), *arguments)
    return [result.picked(0, index) for index in range(len(pairs))]


def _turned(b: NumbaTensor, target: DataType) -> NumbaTensor:
    """The last two axes swapped, in another float type."""
    swapped = b.permuted((*range(b.ndim() - 2), b.ndim() - 1, b.ndim() - 2))
    return swapped if b.dtype() is target else cast_float(swapped.contiguous(), target)


def _in_one_piece(tensors: Sequence[NumbaTensor]) -> DeviceArray:
    """The elements of tensors of one shape and type, one after the other."""
    if len(tensors) == 1:
        return tensors[0].flat()
    runtime, size, element = tensors[0].runtime, tensors[0].numel(), carrier(tensors[0].dtype())
    memory = runtime.machine.empty(len(tensors) * size, element)
    for index, tensor in enumerate(tensors if size else ()):
        place = memory[index * size : (index + 1) * size]
        runtime.gathered(tensor.array, tensor.shape(), tensor.strides, tensor.offset, element, place)
    return memory


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
        if num_rows > x.runtime.tuning.gemv_rows:
            grid = (-(-num_columns // TILE), -(-num_rows // TILE), 1)
            x.runtime.launch(gemm, (kind, weights), grid, (SIDE, SIDE, 1), *arguments)
        elif weights.storage is None:
            grid, block = packed_gemv.blocks_for(weights, num_rows, num_columns)
            few = (x.flat(), words, result.array, num_columns, depth)
            x.runtime.launch(packed_gemv.packed_gemv, (kind, weights), grid, block, *few)
        else:
            grid, block = gemv.blocks_for(num_rows, num_columns)
            dense = (x.flat(), words, result.array, num_rows, num_columns, depth)
            x.runtime.launch(gemv.gemv, (kind, weights.storage), grid, block, *dense)
    return result
