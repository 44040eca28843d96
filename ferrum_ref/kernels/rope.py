"""Rotary position embedding.   Clauses: KN-ROPE-1..7.

Source: Su et al. 2021 (RoFormer), eq. 34; pairing of the halves as in GPT-NeoX and Llama.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.integers import as_integers
from ferrum_ref.kernels.rounding import FLOAT32, FLOAT64, Array, DType, compute_dtype, round_to, widen
from ferrum_ref.types.parity_mode import ParityMode


def rope_frequencies(head_dim: int, theta: float, *, angle_dtype: DTypeLike = FLOAT64) -> Array:
    """f[i] = theta ** (-2 i / D) for i < D/2, in `angle_dtype`          [KN-ROPE-6]

    Pure. Raises InvalidParameterError unless head_dim is even and positive and theta > 0.
    """
    if head_dim <= 0 or head_dim % 2 or not theta > 0:
        raise InvalidParameterError(
            f"rope_frequencies: head_dim={head_dim}, theta={theta}; expected an even size above 0 and theta above 0"
        )
    dtype: DType = np.dtype(angle_dtype)
    exponents = np.arange(0, head_dim, 2).astype(dtype) / dtype.type(head_dim)
    return np.asarray(dtype.type(1) / np.power(dtype.type(theta), exponents), dtype=dtype)


def rope_tables(
    frequencies: Array, max_positions: int, *, dtype: DTypeLike = FLOAT32, scale: float = 1.0
) -> tuple[Array, Array]:
    """cos[p, i] = scale * cos(p f[i]), sin alike, for positions 0 .. max_positions-1          [KN-ROPE-6]

    frequencies (D/2,) float32 or float64; angles, cosines and sines are computed in that type and rounded once to
    `dtype`; results (max_positions, D/2). float32 frequencies reproduce Hugging Face's tables, whose angles err by up
    to p * 2**-24; float64 ones are exact to the last bit of a float32 table. Pure.
    Raises ShapeError unless frequencies is a vector; InvalidParameterError for a negative max_positions.
    """
    compute = compute_dtype("rope_tables", frequencies)
    if frequencies.ndim != 1:
        raise ShapeError(f"rope_tables: frequencies {frequencies.shape}, expected (D/2,)")
    if max_positions < 0:
        raise InvalidParameterError(f"rope_tables: max_positions is {max_positions}, expected at least 0")
    angles = np.arange(max_positions).astype(compute)[:, None] * widen(frequencies, compute)
    factor = compute.type(scale)
    target = np.dtype(dtype)
    return round_to(np.cos(angles) * factor, target), round_to(np.sin(angles) * factor, target)


def rotary_embedding(
    x: Array,
    cos: Array,
    sin: Array,
    positions: Sequence[int] | Array,
    *,
    pairing: str = "half",
    parity_mode: ParityMode = ParityMode.REFERENCE,
) -> Array:
    """(a, b) -> (a c - b s, b c + a s) for every pair (a, b) of a head, c, s = cos[p, i], sin[p, i]   [KN-ROPE-1..7]

    x (B, T, H, D) any float; cos, sin (P, D/2); positions T ints, one for each token: every one indexes the tables.
    pairing "half": pair i is (x[i], x[i + D/2]); "adjacent": (x[2i], x[2i+1]), the order of GGUF's Llama weights.
    UPSTREAM: the first position and its successors, whatever the others are (D-15).
    Computed in float32 at least, rounded once; the result has x's shape and type. Pure.
    Raises ShapeError for other shapes or len(positions) != T; InvalidParameterError for a position outside [0, P) or
    another pairing.
    """
    dtype = compute_dtype("rotary_embedding", x, cos, sin)
    half = cos.shape[-1] if cos.ndim == 2 else -1
    if x.ndim != 4 or cos.ndim != 2 or cos.shape != sin.shape or x.shape[3] != 2 * half:
        raise ShapeError(
            f"rotary_embedding: x {x.shape}, cos {cos.shape}, sin {sin.shape}; "
            "expected (B, T, H, D) and tables (P, D/2)"
        )
    if pairing not in ("half", "adjacent"):
        raise InvalidParameterError(f"rotary_embedding: pairing is {pairing!r}, expected 'half' or 'adjacent'")
    if parity_mode is ParityMode.UPSTREAM and len(positions):
        positions = range(int(positions[0]), int(positions[0]) + x.shape[1])
    rows = _table_rows(positions, x.shape[1], cos.shape[0])
    c = widen(cos[rows], dtype)[:, None, :]
    s = widen(sin[rows], dtype)[:, None, :]
    out = np.empty(x.shape, dtype)
    wide = widen(x, dtype)
    a, b, to_a, to_b = (*_pairs(wide, pairing), *_pairs(out, pairing))
    with np.errstate(all="ignore"):
        np.multiply(a, c, out=to_a)
        to_a -= b * s
        np.multiply(b, c, out=to_b)
        to_b += a * s
        return round_to(out, x.dtype)


def _pairs(x: Array, pairing: str) -> tuple[Array, Array]:
    if pairing == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def _table_rows(positions: Sequence[int] | Array, num_tokens: int, num_rows: int) -> slice | Array:
    """The table rows of the positions; a slice (no copy) where they are consecutive."""
    if len(positions) != num_tokens:
        raise ShapeError(
            f"rotary_embedding: {len(positions)} position_ids for {num_tokens} tokens, expected one for each"
        )
    index = as_integers("rotary_embedding", "position_ids", positions)
    if not num_tokens:
        return slice(0, 0)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_rows:
        raise InvalidParameterError(
            f"rotary_embedding: position {low if low < 0 else high}, expected 0 <= position < {num_rows}; "
            "build longer tables or shorten the sequence"
        )
    if high - low == num_tokens - 1 and (num_tokens == 1 or bool((np.diff(index) == 1).all())):
        return slice(low, high + 1)
    return index
