"""Choosing a token from logits: what is checked, and what is launched.

Clauses: BK-NCPU-15 (specs/backend_numba.md), KN-ARGMAX-1..2, KN-SAMPLE-1..10 (specs/kernels.md).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.choices import choose
from ferrum_numba.cpu.conversion import FLOAT64, widen
from ferrum_numba.cpu.integers import as_integers
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams

Array = NDArray[Any]


def argmax(logits: Array) -> int:
    """The smallest i with logits[i] = max(logits) (D-03); logits (V,) or (1, V). Pure.

    Raises ShapeError for another shape or V = 0; BackendError for a NaN or -inf everywhere.
    """
    row = widen(_row("argmax", logits), "argmax")
    index = int(row.argmax())  # numpy stops at the first NaN, so the value found tells all
    _check_best("argmax", float(row[index]), index)
    return index


def sample_token(logits: Array, params: KernelSamplingParams) -> int:
    """Repetition penalty, temperature, top-k, top-p, then one draw, all in float64 (D-18). Pure.

    Each distinct listed id with a nonzero count once: x/r if x > 0, else x*r. Temperature below 1e-5: argmax. top-k
    keeps ties with the k-th largest. top-p: descending, ties by lower id, keep while the mass before is below top_p.
    Draw: the first kept id whose running sum exceeds u * total, in order of ids, u from the mixed seed.
    Raises ShapeError; InvalidParameterError for a parameter outside its domain; BackendError for NaN, +inf or -inf
    everywhere.
    """
    _check_parameters(params)
    row = widen(_row("sample_token", logits), "sample_token").astype(FLOAT64)
    index = int(row.argmax())
    _check_best("sample_token", float(row[index]), index)
    if row[index] == np.inf:
        raise BackendError(f"sample_token: logits: got +inf at index {index}, expected finite logits or -inf")
    listed = _listed(params, row.size)
    return int(
        choose(
            *(address_of(row), row.size, address_of(listed), listed.size),
            *(float(params.repetition_penalty), float(params.temperature)),
            *(min(params.top_k, row.size), float(params.top_p), params.rng_seed),
        )
    )


def _listed(params: KernelSamplingParams, num_logits: int) -> NDArray[np.int64]:
    """The distinct ids to penalise."""
    listed = as_integers("sample_token", "repetition_token_ids", params.repetition_token_ids)
    counts = as_integers("sample_token", "repetition_token_freqs", params.repetition_token_freqs)
    if listed.size != counts.size:
        raise InvalidParameterError(
            f"sample_token: {listed.size} repetition_token_ids with {counts.size} repetition_token_freqs, "
            "expected equal counts"
        )
    if listed.size and not 0 <= int(listed.min()) <= int(listed.max()) < num_logits:
        raise InvalidParameterError(
            f"sample_token: repetition_token_ids: got {int(listed.min())} to {int(listed.max())}, "
            f"expected ids in [0, {num_logits})"
        )
    return np.unique(listed[counts != 0])


def _row(operation: str, logits: Array) -> Array:
    row = logits[0] if logits.ndim == 2 and logits.shape[0] == 1 else logits
    if row.ndim != 1 or row.shape[0] == 0:
        raise ShapeError(
            f"{operation}: logits {logits.shape}, expected (V,) or (1, V) with V > 0; pass one row at a time"
        )
    return row


def _check_best(operation: str, best: float, index: int) -> None:
    if math.isnan(best):
        raise BackendError(
            f"{operation}: NaN logits (index {index}), expected numbers; the model's forward pass has failed"
        )
    if best == -math.inf:
        raise BackendError(f"{operation}: No valid tokens: every logit is -inf; a mask excludes the whole vocabulary")


def _check_parameters(params: KernelSamplingParams) -> None:
    for name, good, expected in (
        ("temperature", 0 <= params.temperature < math.inf, "a number >= 0"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("top_p", params.top_p > 0, "a number above 0 (1 and more: off)"),
        ("repetition_penalty", 0 < params.repetition_penalty < math.inf, "a number above 0 (1: off)"),
        ("rng_seed", 0 <= params.rng_seed < 2**32, "an integer in [0, 2**32)"),
    ):
        if not good:
            raise InvalidParameterError(f"sample_token: {name}: got {getattr(params, name)}, expected {expected}")
