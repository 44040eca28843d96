"""Matrix products, packed weights and the embedding table.

Weights meet a few rows as they are stored; for more rows some of the weight at a time is decoded to float32, which is
exact, and transposed (`products`). `matmul` is BLAS's, as numpy calls it.
Clauses: BK-NCPU-12..13, BK-NCPU-22 (specs/backend_numba.md), KN-LINEAR-*, KN-QLINEAR-*, KN-EMBED-* (specs/kernels.md).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.conversion import FLOAT32, KINDS, common_type, require_float, round_to, run_of, widen
from ferrum_numba.cpu.integers import as_integers
from ferrum_numba.cpu.matrices import MULTIPLY_ROWS, UNPACK_RUN, multiply
from ferrum_numba.cpu.packing import StoredMatrix, as_stored
from ferrum_numba.cpu.products import DEPTH, multiply_many, multiply_panels
from ferrum_numba.cpu.vector import F32, I8, unit_of
from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints, QuantScheme
from ferrum_ref.interfaces.tensor import matmul_output_shape

Array = NDArray[Any]
Float32 = NDArray[np.float32]

FEW_ROWS: Final = 4  # of x: more are better served by panels


def linear(x: Array, weight: Array) -> Array:
    """y = x @ weight.T; x (..., in) of rank >= 1, weight (out, in); result in x's type. Pure. Raises ShapeError."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: input {x.shape} and weight {weight.shape}, expected (..., in) and (out, in); "
            "weights are stored output first"
        )
    require_float(weight, "linear")
    rows = widen(x, "linear").reshape(math.prod(x.shape[:-1]), weight.shape[1])
    kept = run_of(weight if weight.dtype in KINDS else widen(weight, "linear"))
    y = _product(rows, StoredMatrix(KINDS[kept.dtype], kept, weight.shape[1]))
    return round_to(y, x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def quantized_linear(x: Array, packed: Array, scheme: QuantScheme) -> Array:
    """y = x @ W.T, W the float32 values of rows that stay as their file has them          [BK-NCPU-13, BK-NCPU-22]

    x (..., in); packed (out, row bytes) uint8: ggml's blocks (`blocks`), or float32, float16 and bfloat16 numbers.
    Activations are never quantised. Result in x's type. Pure.
    Raises UnsupportedError for other schemes; ShapeError for other shapes or element types.
    """
    matrix = as_stored("quantized_linear", packed, scheme)
    if x.ndim < 1 or matrix.columns != x.shape[-1]:
        raise ShapeError(
            f"quantized_linear: input {x.shape} and packed_weight uint8 {packed.shape}, whose {scheme.kind} rows are "
            f"{matrix.columns} weights; expected (..., {matrix.columns})"
        )
    rows = widen(x, "quantized_linear").reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _product(rows, matrix)
    return round_to(y, x.dtype).reshape(*x.shape[:-1], packed.shape[0])


def row_scaled_linear(x: Array, weight: Array, scales: Array) -> Array:
    """y_o = scales_o sum_i weight_oi x_i: int8 weights with one float32 scale for each output (extension).

    x (..., in) any float; weight (out, in) int8; scales (out,) float32. Activations are never quantised. Result in x's
    type. Pure. Raises ShapeError for other shapes or element types.
    """
    if (
        weight.dtype != np.int8
        or weight.ndim != 2
        or x.ndim < 1
        or x.shape[-1] != weight.shape[1]
        or scales.shape != weight.shape[:1]
        or scales.dtype != FLOAT32
    ):
        raise ShapeError(
            f"row_scaled_linear: input {x.shape}, weight {weight.shape} of {weight.dtype}, scales {scales.shape} of "
            f"{scales.dtype}; expected (..., in), int8 (out, in) and float32 (out,)"
        )
    rows = widen(x, "row_scaled_linear").reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _product(rows, StoredMatrix(I8, run_of(weight), weight.shape[1], run_of(scales)))
    return round_to(y, x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _product(rows: Float32, weight: StoredMatrix) -> Float32:
    """rows (M, in) times the stored weight's values, transposed: (M, out) float32."""
    rows = run_of(rows)
    (num_rows, size), num_outputs = rows.shape, weight.rows
    if not size:
        return np.zeros((num_rows, num_outputs), FLOAT32)
    y = np.empty((num_rows, num_outputs), FLOAT32)
    data, scales = address_of(weight.data), 0 if weight.scales is None else address_of(weight.scales)
    operands = (scales, address_of(rows), address_of(y), num_rows, size, num_outputs)
    if num_rows <= FEW_ROWS:
        multiply(MULTIPLY_ROWS[weight.kind].address, data, weight.stride, *operands)
    else:
        decode = 0 if weight.kind == F32 else UNPACK_RUN[weight.kind].address
        (num_elements, num_bytes), turn = unit_of(weight.kind), np.zeros(1, np.int64)
        where = (data, weight.stride, DEPTH // num_elements * num_bytes)
        multiply_many(multiply_panels.address, address_of(turn), decode, *where, *operands)
    return y


def embedding(table: Array, ids: Ints) -> Array:
    """y[t] = table[ids[t]]; table (V, E) any type, ids T integers; result (T, E). Pure.

    Raises ShapeError if table is not a matrix; InvalidParameterError for an id outside [0, V) or not an integer.
    """
    if table.ndim != 2:
        raise ShapeError(f"embedding: table {table.shape}, expected (V, E)")
    index = as_integers("embedding", "ids", ids)
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < table.shape[0]:
        bad = index[(index < 0) | (index >= table.shape[0])]
        raise InvalidParameterError(
            f"embedding: ids: got {int(bad[0])}, expected 0 <= id < {table.shape[0]}; "
            "the tokenizer and the model disagree"
        )
    return np.take(table, index, axis=0)


def matmul(a: Array, b: Array) -> Array:
    """a @ b: [.., m, k] x [.., k, n] -> [.., m, n] in the common type; leading axes broadcast. Pure."""
    matmul_output_shape(a.shape, b.shape)
    with np.errstate(all="ignore"):
        product = np.matmul(widen(a, "matmul"), widen(b, "matmul"))
    return round_to(product, common_type("matmul", a.dtype, b.dtype))
