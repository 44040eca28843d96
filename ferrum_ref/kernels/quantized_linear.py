"""Projection by weights that stay packed.   Clauses: KN-QLINEAR-1..4, QT-MATRIX-3."""

from __future__ import annotations

import math

import numpy as np

from ferrum_ref.errors import ShapeError, UnsupportedError
from ferrum_ref.kernels.quant import quant_format
from ferrum_ref.kernels.quant_matrix import QuantMatrix, RowMatrix
from ferrum_ref.kernels.rounding import Array, compute_dtype, round_to, widen

_BLOCK_ELEMENTS = 1 << 18  # of the weight, unpacked at a time: 1 MB of float32, within a core's second-level cache
_SCHEMES = ("Q4_0", "Q8_0")


def quantized_linear(x: Array, packed: Array, scheme: str, group_size: int) -> Array:
    """y = x @ W.T,  W[o, 32 b + i] = d_ob (q_obi - 8) for Q4_0, d_ob q_obi for Q8_0          [KN-QLINEAR-1..4]

    x (..., in) any float, rank >= 1; packed (out, in/32 * block bytes) uint8, ggml's blocks of 18 (Q4_0) or 34 bytes
    (Q8_0), d a float16. A few rows of W at a time are unpacked, exactly, to float32; products and sums in float32 at
    least, in the order BLAS chooses; each result rounded once, to x's type; x itself is never quantised. Pure.
    Raises UnsupportedError for another scheme or a group other than 32; ShapeError for other shapes or bytes.
    Source: ggml, block_q4_0 and block_q8_0.
    """
    compute_dtype("quantized_linear", x)
    if scheme not in _SCHEMES or group_size != quant_format(scheme).block_elements:
        raise UnsupportedError(
            f"quantized_linear: scheme {scheme} with group_size={group_size}, expected Q4_0 or Q8_0 in ggml's groups "
            "of 32; dequantise and call linear"
        )
    layout = quant_format(scheme)
    if (
        packed.dtype != np.uint8
        or packed.ndim != 2
        or x.ndim < 1
        or packed.shape[1] * layout.block_elements != x.shape[-1] * layout.block_bytes
    ):
        raise ShapeError(
            f"quantized_linear: input {x.shape} and packed_weight {packed.shape} of {packed.dtype}, expected (..., in) "
            f"and uint8 (out, in/{layout.block_elements}*{layout.block_bytes})"
        )
    return packed_linear(x, RowMatrix(packed, scheme))


def packed_linear(x: Array, matrix: QuantMatrix) -> Array:
    """y = x @ W.T for any packed W (out, in)          [QT-MATRIX-3]

    x (..., in) any float, rank >= 1; result (..., out) in x's type. As `quantized_linear`: about a megabyte of W is
    unpacked at a time (whole runs of `matrix.row_step` rows), and never all of it. Pure.
    Raises ShapeError where x has another number of columns.
    """
    dtype = compute_dtype("quantized_linear", x)
    size_out, size_in = matrix.shape
    if x.ndim < 1 or x.shape[-1] != size_in:
        raise ShapeError(
            f"quantized_linear: input {x.shape} and packed weight {matrix.shape}, expected (..., {size_in})"
        )
    rows = widen(x, dtype).reshape(math.prod(x.shape[:-1]), size_in)
    y = np.empty((rows.shape[0], size_out), dtype)
    runs = max(1, _BLOCK_ELEMENTS // max(1, size_in * matrix.row_step))
    step = runs * matrix.row_step
    unpacked = np.empty((min(step, size_out), size_in), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, size_out, step):
            stop = min(start + step, size_out)
            weight = matrix.rows(start, stop, unpacked[: stop - start])
            y[:, start:stop] = np.dot(rows, widen(weight, dtype).T)
        return round_to(y.reshape((*x.shape[:-1], size_out)), x.dtype)
