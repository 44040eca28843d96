"""Activations, broadcast arithmetic and rotary embedding: what is checked, and what is launched.

Clauses: BK-NCPU-8..9 (specs/backend_numba.md), KN-SILU-*, KN-GELU-*, KN-RELU-1, KN-ROPE-* (specs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu import pointwise
from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.conversion import (
    FLOAT32,
    FLOAT64,
    FLOATS,
    KINDS,
    common_type,
    computable,
    round_to,
    run_of,
    widen,
)
from ferrum_numba.cpu.integers import as_integers
from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints
from ferrum_ref.interfaces.tensor import are_broadcastable

Array = NDArray[Any]
BLOCK: Final = 2048  # elements of a contiguous operand worked on at a time
FORMS: Final = {"none": pointwise.ERF, "tanh": pointwise.TANH}


def silu(x: Array) -> Array:
    """y = x * sigmoid(x); at -inf it is -0. Result in x's type. Pure."""
    source = computable(x, "silu")
    found = np.empty(source.shape, source.dtype)
    step = BLOCK * source.dtype.itemsize
    addresses = (address_of(source), 0, address_of(found))
    pointwise.silu_mul(*addresses, step, step, BLOCK, source.size, KINDS[source.dtype])
    return round_to(found, x.dtype)


def silu_mul(gate: Array, up: Array) -> Array:
    """y = silu(gate) * up, rounded once. Equal shapes; result in gate's type. Pure. Raises ShapeError otherwise."""
    if gate.shape != up.shape:
        raise ShapeError(f"silu_mul: gate {gate.shape} and up {up.shape}, expected equal shapes")
    gates, ups = (_rows_apart(array, "silu_mul") for array in (gate, up))
    if gates.dtype != ups.dtype:
        gates, ups = widen(gates, "silu_mul"), widen(ups, "silu_mul")
    found = np.empty(gates.shape, gates.dtype)
    size, steps = BLOCK, [BLOCK * gates.dtype.itemsize] * 2
    if not (gates.flags.c_contiguous and ups.flags.c_contiguous):
        size, steps = gates.shape[-1], [gates.strides[0], ups.strides[0]]
    addresses = (address_of(gates), address_of(ups), address_of(found))
    pointwise.silu_mul(*addresses, *steps, size, gates.size, KINDS[gates.dtype])
    return round_to(found, gate.dtype)


def _rows_apart(array: Array, operation: str) -> Array:
    """The array itself if it is a matrix whose rows are runs, apart or not; else in one run."""
    if array.dtype in KINDS and array.ndim == 2 and array.size and array.strides[1] == array.dtype.itemsize:
        return array
    return computable(array, operation)


def gelu(x: Array, approximate: str = "none") -> Array:
    """y = x/2 * erfc(-x / sqrt(2)); "tanh": y = x * sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x**3)

    Computed in float64, since 1 + erf(x) cancels for negative x; rounded once to x's type; -0 at -inf. Pure.
    Raises InvalidParameterError for another `approximate`.
    """
    if approximate not in FORMS:
        raise InvalidParameterError(f"gelu: approximate: got {approximate!r}, expected 'none' or 'tanh'")
    source = computable(x, "gelu")
    found = np.empty(source.shape, source.dtype)
    pointwise.gelu(address_of(source), address_of(found), source.size, FORMS[approximate], KINDS[source.dtype])
    return round_to(found, x.dtype)


def relu(x: Array) -> Array:
    """y = max(x, 0), exact; NaN stays NaN. Result in x's type. Pure."""
    with np.errstate(all="ignore"):
        return round_to(np.asarray(np.maximum(widen(x, "relu"), np.float32(0.0))), x.dtype)


def arithmetic(operation: str, function: Callable[..., Any], a: Array, b: Array) -> Array:
    """function(a, b), broadcast (D-51), rounded once to the common type; IEEE inf and NaN, no warning. Pure.

    Integers wrap around; the quotient of two integers is fp32. Raises ShapeError for shapes that do not broadcast;
    BackendError for types without a common one.
    """
    if a.shape != b.shape and not are_broadcastable(a.shape, b.shape):
        raise ShapeError(
            f"{operation}: shapes {a.shape} and {b.shape} do not broadcast; "
            "expected dimensions, aligned at the right, to be equal or 1"
        )
    with np.errstate(all="ignore"):
        if a.dtype == FLOAT32 and b.dtype == FLOAT32:
            return np.asarray(function(a, b))
        target = common_type(operation, a.dtype, b.dtype)
        if target in FLOATS:
            if a.dtype in FLOATS and b.dtype in FLOATS:
                return round_to(np.asarray(function(widen(a, operation), widen(b, operation))), target)
            wide = (
                (array if array.dtype not in FLOATS else widen(array, operation)).astype(FLOAT64) for array in (a, b)
            )
            return round_to(np.asarray(function(*wide)), target)
        if function is np.divide:
            return np.asarray(function(a.astype(FLOAT64), b.astype(FLOAT64))).astype(FLOAT32)
        return np.asarray(function(a.astype(np.int64), b.astype(np.int64))).astype(target)


def rotary_embedding(x: Array, cos: Array, sin: Array, positions: Ints) -> Array:
    """(a, b) -> (a c - b s, b c + a s) for every pair (x[i], x[i + D/2]) of a head, c, s = cos[p, i], sin[p, i]

    x (B, T, H, D); cos, sin (P, D/2); one position for each token, each one indexes the tables (D-15). Result in x's
    type. Pure. Raises ShapeError for other shapes; InvalidParameterError for a position outside [0, P).
    """
    operation = "rotary_embedding"
    if x.ndim != 4 or cos.ndim != 2 or cos.shape != sin.shape or x.shape[3] != 2 * cos.shape[1]:
        raise ShapeError(
            f"{operation}: x {x.shape}, cos_cache {cos.shape}, sin_cache {sin.shape}; "
            "expected (B, T, H, D) and tables (P, D/2)"
        )
    index = as_integers(operation, "position_ids", positions)
    if len(index) != x.shape[1]:
        raise ShapeError(f"{operation}: {len(index)} position_ids for {x.shape[1]} tokens, expected one for each")
    if x.size == 0:
        return np.empty(x.shape, x.dtype)
    if not 0 <= int(index.min()) <= int(index.max()) < cos.shape[0]:
        bad = index[(index < 0) | (index >= cos.shape[0])]
        raise InvalidParameterError(
            f"{operation}: position_ids: got {int(bad[0])}, expected 0 <= position < {cos.shape[0]}; "
            "build longer tables or shorten the sequence"
        )
    source = x if x.dtype in KINDS and x.strides[3] == x.dtype.itemsize else computable(x, operation)
    first, last = int(index.min()), int(index.max()) + 1  # the rows of the tables that are needed at all
    tables = [run_of(widen(table[first:last], operation)) for table in (cos, sin)]
    places = np.ascontiguousarray(index - first)
    found = np.empty(source.shape, source.dtype)
    addresses = (address_of(array) for array in (source, *tables, places, found))
    pointwise.rotate(*addresses, *source.shape, *source.strides[:3], KINDS[source.dtype])
    return round_to(found, x.dtype)
