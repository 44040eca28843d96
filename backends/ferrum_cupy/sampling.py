"""Choosing a token from logits, on their device, in float64.  Clauses: BK-CUPY-13, KN-ARGMAX-1..2, KN-SAMPLE-1..8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ferrum_cupy.machine import DeviceArray
from ferrum_cupy.runtime import Runtime, as_integers
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams

GREEDY_BELOW = 1e-5


def argmax(runtime: Runtime, logits: CupyTensor) -> int:
    """The smallest i with logits[i] = max(logits) (D-03); logits (V,) or (1, V). Pure.

    Raises ShapeError for another shape or V = 0; BackendError for a NaN or -inf everywhere.
    """
    row = _row(runtime, "argmax", logits)
    return _first(runtime.machine.xp, row, _best(runtime.machine.xp, "argmax", row))


def sample_token(runtime: Runtime, logits: CupyTensor, params: KernelSamplingParams) -> int:
    """Repetition penalty, temperature, top-k, top-p, then one draw (D-18): one token a seed.

    The reference's token for the same seed. Pure.

    Raises ShapeError; InvalidParameterError for a parameter outside its domain; BackendError for NaN, +inf or -inf
    everywhere.
    """
    xp = runtime.machine.xp
    _check_parameters(params)
    row = _row(runtime, "sample_token", logits).astype(np.float64)
    best = _best(xp, "sample_token", row)
    if best == math.inf:
        index = _first(xp, row, best)
        raise BackendError(f"sample_token: logits: got +inf at index {index}, expected finite logits or -inf")
    row = _penalised(runtime, row, params)
    if params.temperature < GREEDY_BELOW:
        return _first(xp, row, float(row.max()))
    kept = _kept(xp, row / params.temperature, params.top_k, params.top_p)
    candidates = xp.flatnonzero(kept)
    running = xp.cumsum(kept[candidates])
    point = float(running[-1]) * _uniform(params.rng_seed)
    position = int(xp.searchsorted(running, xp.asarray([point]), side="right")[0])
    return int(candidates[min(position, len(candidates) - 1)])


def _penalised(runtime: Runtime, row: DeviceArray, params: KernelSamplingParams) -> DeviceArray:
    """Every distinct listed id of nonzero count once: x/r if x > 0, else x*r. Pure."""
    listed = as_integers("sample_token", "repetition_token_ids", params.repetition_token_ids)
    counts = as_integers("sample_token", "repetition_token_freqs", params.repetition_token_freqs)
    if listed.size != counts.size:
        raise InvalidParameterError(
            f"sample_token: {listed.size} repetition_token_ids with {counts.size} repetition_token_freqs, "
            "expected equal counts"
        )
    if listed.size and not 0 <= int(listed.min()) <= int(listed.max()) < row.shape[0]:
        raise InvalidParameterError(
            f"sample_token: repetition_token_ids: got {int(listed.min())} to {int(listed.max())}, "
            f"expected ids in [0, {row.shape[0]})"
        )
    chosen = np.unique(listed[counts != 0])
    if not chosen.size:
        return row
    index, result = runtime.indices(chosen), row.copy()
    old = row[index]
    result[index] = runtime.machine.xp.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    return result


def _kept(xp: Any, scores: DeviceArray, top_k: int, top_p: float) -> DeviceArray:
    """softmax(scores) with everything outside top-k (ties kept), then outside top-p, set to 0; not rescaled. Pure."""
    if 0 < top_k < scores.shape[0]:
        threshold = xp.sort(scores)[-top_k]
        scores = xp.where(scores < threshold, -np.inf, scores)
    exponentials = xp.exp(scores - scores.max())
    p = exponentials / exponentials.sum()
    if top_p < 1.0:
        order = xp.argsort(-p, kind="stable")
        descending = p[order]
        dropped = xp.cumsum(descending) - descending >= top_p
        dropped[0] = False
        p[order[dropped]] = 0.0
    return p


def _uniform(seed: int) -> float:
    """u in [0, 1): the 32-bit seed, mixed by MurmurHash3's finaliser, over 2**32. Pure.  Source: Appleby, fmix32."""
    mixed = seed ^ (seed >> 16)
    mixed = mixed * 0x85EBCA6B % 2**32
    mixed ^= mixed >> 13
    mixed = mixed * 0xC2B2AE35 % 2**32
    return (mixed ^ (mixed >> 16)) / 2.0**32


def _row(runtime: Runtime, operation: str, logits: CupyTensor) -> DeviceArray:
    shape = logits.shape()
    if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)) or shape[-1] == 0:
        raise ShapeError(f"{operation}: logits {shape}, expected (V,) or (1, V) with V > 0; pass one row at a time")
    return runtime.wide(operation, logits).reshape(-1)


def _best(xp: Any, operation: str, row: DeviceArray) -> float:
    """The largest logit, which is a number above -inf."""
    best = float(row.max())  # NaN if any is
    if math.isnan(best):
        index = int(xp.flatnonzero(xp.isnan(row))[0])
        raise BackendError(
            f"{operation}: NaN logits (index {index}), expected numbers; the model's forward pass has failed"
        )
    if best == -math.inf:
        raise BackendError(f"{operation}: No valid tokens: every logit is -inf; a mask excludes the whole vocabulary")
    return best


def _first(xp: Any, row: DeviceArray, value: float) -> int:
    return int(xp.flatnonzero(row == value)[0])


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
