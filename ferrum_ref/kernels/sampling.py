"""Choosing a token from logits.   Clauses: KN-ARGMAX-1..2, KN-SAMPLE-1..8."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.kernels.integers import as_integers
from ferrum_ref.kernels.rounding import FLOAT32, FLOAT64, Array, compute_dtype, widen

_GREEDY_BELOW = 1e-5


def argmax(logits: Array) -> int:
    """The smallest i with logits[i] = max(logits)          [KN-ARGMAX-1..2]

    logits (V,) or (1, V), any float. +inf wins; -inf never does. Pure.
    Raises ShapeError for another shape or V = 0; BackendError for a NaN or -inf everywhere.
    """
    row = _row("argmax", logits)
    if row.dtype != FLOAT32:
        row = widen(row, compute_dtype("argmax", row))
    index = int(row.argmax())  # numpy stops at the first NaN, so the value found tells all
    _check_best("argmax", row, index)
    return index


def sample_token(
    logits: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    repetition_token_ids: Sequence[int] | Array = (),
    repetition_token_freqs: Sequence[int] | Array = (),
    rng_seed: int,
) -> int:
    """Repetition penalty, temperature, top-k, top-p, then one draw; all in float64          [KN-SAMPLE-1..8]

    logits (V,) or (1, V). Penalty r: each distinct listed id with a nonzero count once: x/r if x > 0, else x*r.
    temperature T < 1e-5: argmax of the penalised logits; else x/T. top_k k > 0: drop what lies below the k-th largest
    (ties with it stay); 0 is off. top_p: in descending order, ties by lower id, keep i while the mass before i is below
    top_p; at least one stays. Draw: the first kept id whose running sum exceeds u * total, in order of ids, with
    u = uniform_from_seed(rng_seed). Pure.
    Raises ShapeError; InvalidParameterError for a parameter outside its domain; BackendError for NaN, +inf, or -inf
    everywhere.
    """
    _check_parameters(temperature, top_k, top_p, repetition_penalty, rng_seed)
    row = _row("sample_token", logits)
    compute_dtype("sample_token", row)
    x = row.astype(FLOAT64)
    best = int(x.argmax())
    _check_best("sample_token", x, best)
    if x[best] == np.inf:
        raise BackendError(f"sample_token: +inf at index {best}, expected finite logits or -inf")
    penalised = _penalised_ids(repetition_token_ids, repetition_token_freqs, x.size)
    x[penalised] = np.where(x[penalised] > 0, x[penalised] / repetition_penalty, x[penalised] * repetition_penalty)
    if temperature < _GREEDY_BELOW:
        return int(x.argmax())
    return _draw(kept_probabilities(x / temperature, top_k, top_p), uniform_from_seed(rng_seed))


def kept_probabilities(scores: Array, top_k: int, top_p: float) -> NDArray[np.float64]:
    """softmax(scores) with everything outside top-k, then outside top-p, set to 0; not rescaled.  [KN-SAMPLE-4..5]

    scores (V,) float64, at least one above -inf. Pure.
    """
    kept = np.asarray(scores, dtype=FLOAT64)
    if 0 < top_k < kept.size:
        threshold = np.partition(kept, kept.size - top_k)[kept.size - top_k]
        kept = np.where(kept < threshold, -np.inf, kept)
    p: NDArray[np.float64] = np.exp(kept - kept.max())
    p /= p.sum()
    if top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[1:][before[1:] >= top_p]] = 0.0
    return p


def uniform_from_seed(seed: int) -> float:
    """u in [0, 1): the 32-bit seed, mixed by MurmurHash3's finaliser, over 2**32          [KN-SAMPLE-7]

    A bijection of the seeds: over all of them u is uniform on the multiples of 2**-32. Pure.
    Source: Appleby, MurmurHash3, fmix32.
    """
    h = seed & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (h ^ (h >> 16)) / 2.0**32


def _draw(p: NDArray[np.float64], u: float) -> int:
    """First index whose running sum exceeds u * total: there is one, for u < 1, and its own probability is positive."""
    running = np.cumsum(p)
    return int(np.searchsorted(running, u * running[-1], side="right"))


def _row(operation: str, logits: Array) -> Array:
    row = logits[0] if logits.ndim == 2 and logits.shape[0] == 1 else logits
    if row.ndim != 1 or row.size == 0:
        raise ShapeError(
            f"{operation}: logits {logits.shape}, expected (V,) or (1, V) with V > 0; pass one row at a time"
        )
    return row


def _check_best(operation: str, row: Array, index: int) -> None:
    best = row[index]
    if best > -np.inf:
        return
    if best == -np.inf:
        raise BackendError(
            f"{operation}: No valid tokens: every logit is -inf; a mask has excluded the whole vocabulary"
        )
    raise BackendError(
        f"{operation}: NaN logits (index {index}); expected numbers; the model's forward pass has failed"
    )


def _penalised_ids(ids: Sequence[int] | Array, freqs: Sequence[int] | Array, vocab: int) -> NDArray[np.int64]:
    listed = as_integers("sample_token", "repetition_token_ids", ids)
    counts = as_integers("sample_token", "repetition_token_freqs", freqs)
    if listed.size != counts.size:
        raise InvalidParameterError(
            f"sample_token: {listed.size} repetition_token_ids with {counts.size} repetition_token_freqs, "
            "expected equal counts"
        )
    if listed.size and (listed.min() < 0 or listed.max() >= vocab):
        raise InvalidParameterError(
            f"sample_token: repetition_token_ids reach from {listed.min()} to {listed.max()}, expected [0, {vocab})"
        )
    active: NDArray[np.int64] = listed[counts != 0]
    return active  # an id listed twice is read and written once


def _check_parameters(temperature: float, top_k: int, top_p: float, penalty: float, seed: int) -> None:
    for name, value, good, expected in (
        ("temperature", temperature, 0 <= temperature < np.inf, "a number >= 0"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, top_p > 0, "a number above 0 (1 and more: off)"),
        ("repetition_penalty", penalty, 0 < penalty < np.inf, "a number above 0 (1: off)"),
        ("rng_seed", seed, 0 <= seed < 2**32, "an integer in [0, 2**32)"),
    ):
        if not good:
            raise InvalidParameterError(f"sample_token: {name} is {value}, expected {expected}")
