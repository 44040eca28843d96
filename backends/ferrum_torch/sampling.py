"""Choosing a token from logits, on their device.

Clauses: BK-TORCH-17..18 (specs/backend_torch.md), KN-ARGMAX-1..2, KN-SAMPLE-1..8 (specs/kernels.md).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams
from ferrum_torch.integers import as_integers
from ferrum_torch.rounding import widen

GREEDY_BELOW = 1e-5


def argmax(logits: torch.Tensor) -> int:
    """The smallest i with logits[i] = max(logits) (D-03); logits (V,) or (1, V). Pure.

    torch.argmax may return any of several maxima; this does not. Raises ShapeError for another shape or V = 0;
    BackendError for a NaN or -inf everywhere.
    """
    row = widen(_row("argmax", logits), "argmax")
    return _first(row, _best("argmax", row))


def sample_token(logits: torch.Tensor, params: KernelSamplingParams) -> int:
    """Repetition penalty, temperature, top-k, top-p, then one draw, all in float64 (D-18). Pure.

    Each distinct listed id with a nonzero count once: x/r if x > 0, else x*r. Temperature below 1e-5: argmax. top-k
    keeps ties with the k-th largest. top-p: descending, ties by lower id, keep while the mass before is below top_p.
    Draw: the first kept id whose running sum exceeds u * total, in order of ids, u from the mixed seed.
    Raises ShapeError; InvalidParameterError for a parameter outside its domain; BackendError for NaN, +inf or -inf
    everywhere.
    """
    _check_parameters(params)
    row = widen(_row("sample_token", logits), "sample_token").to(torch.float64)
    best = _best("sample_token", row)
    if best == math.inf:
        raise BackendError(
            f"sample_token: logits: got +inf at index {_first(row, best)}, expected finite logits or -inf"
        )
    row = penalised(row, params)
    if params.temperature < GREEDY_BELOW:
        return _first(row, float(row.max()))
    kept = kept_probabilities(row / params.temperature, params.top_k, params.top_p)
    candidates = kept.nonzero()[:, 0]
    running = kept[candidates].cumsum(0)
    point = running[-1] * uniform_from_seed(params.rng_seed)
    position = int(torch.searchsorted(running, point, right=True))
    return int(candidates[min(position, candidates.shape[0] - 1)])


def penalised(row: torch.Tensor, params: KernelSamplingParams) -> torch.Tensor:
    """The logits with every distinct listed id of nonzero count penalised once. Pure."""
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
    if not listed.size:
        return row
    index = torch.from_numpy(np.unique(listed[counts != 0])).to(row.device)
    old = row[index]
    factor = params.repetition_penalty
    return row.index_copy(0, index, torch.where(old > 0, old / factor, old * factor))


def kept_probabilities(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """softmax(scores) with everything outside top-k, then outside top-p, set to 0; not rescaled. Pure."""
    if 0 < top_k < scores.shape[0]:
        threshold = scores.topk(top_k).values[-1]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    p = torch.softmax(scores, 0)
    if top_p < 1.0:
        descending, order = torch.sort(p, descending=True, stable=True)
        dropped = descending.cumsum(0) - descending >= top_p
        dropped[0] = False
        p[order[dropped]] = 0.0
    return p


def uniform_from_seed(seed: int) -> float:
    """u in [0, 1): the 32-bit seed, mixed by MurmurHash3's finaliser, over 2**32. Pure.

    Source: Appleby, MurmurHash3, fmix32.
    """
    mixed = seed ^ (seed >> 16)
    mixed = mixed * 0x85EBCA6B % 2**32
    mixed ^= mixed >> 13
    mixed = mixed * 0xC2B2AE35 % 2**32
    return (mixed ^ (mixed >> 16)) / 2.0**32


def _row(operation: str, logits: torch.Tensor) -> torch.Tensor:
    row = logits[0] if logits.ndim == 2 and logits.shape[0] == 1 else logits
    if row.ndim != 1 or row.shape[0] == 0:
        raise ShapeError(
            f"{operation}: logits {tuple(logits.shape)}, expected (V,) or (1, V) with V > 0; pass one row at a time"
        )
    return row


def _best(operation: str, row: torch.Tensor) -> float:
    """The largest logit, which is a number above -inf."""
    best = float(row.max())  # NaN if any is
    if math.isnan(best):
        raise BackendError(
            f"{operation}: NaN logits (index {int(row.isnan().nonzero()[0])}), expected numbers; "
            "the model's forward pass has failed"
        )
    if best == -math.inf:
        raise BackendError(f"{operation}: No valid tokens: every logit is -inf; a mask excludes the whole vocabulary")
    return best


def _first(row: torch.Tensor, value: float) -> int:
    return int((row == value).nonzero()[0])


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
