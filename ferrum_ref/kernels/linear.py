"""Projections and the embedding table.   Clauses: KN-LINEAR-1..3, KN-EMBED-1..2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.integers import as_integers
from ferrum_ref.kernels.rounding import Array, compute_dtype, round_to, widen

_BLOCK_ELEMENTS = 1 << 20  # of a narrow weight, widened at a time: 4 MB of float32


def linear(x: Array, weight: Array) -> Array:
    """y = x @ weight.T          [KN-LINEAR-1..3]

    x (..., in) of any rank >= 1; weight (out, in); result (..., out) in x's type. Products and sums in float32 at
    least, in the order BLAS chooses, rounded once. Pure.
    Raises ShapeError if weight is not a matrix or the inner sizes differ.
    """
    dtype = compute_dtype("linear", x, weight)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: input {x.shape} and weight {weight.shape}, expected (..., in) and (out, in); "
            "weights are stored output first"
        )
    rows = widen(x, dtype)
    if x.ndim != 2:
        rows = rows.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with np.errstate(all="ignore"):
        if weight.dtype == dtype:
            y: Array = np.dot(rows, weight.T)
        else:
            y = np.empty((rows.shape[0], weight.shape[0]), dtype)
            step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
            for start in range(0, weight.shape[0], step):
                y[:, start : start + step] = np.dot(rows, weight[start : start + step].astype(dtype).T)
        return round_to(y.reshape((*x.shape[:-1], weight.shape[0])), x.dtype)


def embedding(table: Array, ids: Sequence[int] | Array) -> Array:
    """y[t] = table[ids[t]]          [KN-EMBED-1..2]

    table (V, E) any type; ids T integers; result (T, E) in the table's type, a copy. Pure.
    Raises ShapeError if table is not a matrix; InvalidParameterError for an id outside [0, V) or not an integer.
    """
    if table.ndim != 2:
        raise ShapeError(f"embedding: table {table.shape}, expected (V, E)")
    index = as_integers("embedding", "ids", ids)
    if index.size and (index.min() < 0 or index.max() >= table.shape[0]):
        bad = index[(index < 0) | (index >= table.shape[0])]
        raise InvalidParameterError(
            f"embedding: id {int(bad[0])}, expected 0 <= id < {table.shape[0]}; the tokenizer and the model disagree"
        )
    rows: Array = table[index]
    return rows
