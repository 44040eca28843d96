"""Judging drafted tokens: the mathematics, over any number of sequences at once. Everything here is pure.

With p the target's distribution and q the one a draft was really drawn from (a point mass where it was not drawn):

    accept draft x with probability min(1, p(x) / q(x)); after the first rejection draw from (p - q)+ / sum (p - q)+;
    if every draft is accepted draw one bonus token from p.

The tokens that come out are distributed exactly as p says, whatever q is.
Source: Leviathan et al. 2023, algorithm 1 and appendix A.1; Chen et al. 2023, theorem 1.
Clauses: MX-SPEC-1..5, MX-SPEC-7 (specs/model_executor.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.types.parity_mode import ParityMode

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
GREEDY_BELOW = 1e-5


class Verdict(NamedTuple):
    """Per sequence: how many drafts stand, and the token after them (replacement or bonus)."""

    num_accepted: Ints
    next_token: Ints


def token_distribution(logits: npt.NDArray[Any], temperature: float) -> Floats:
    """softmax(logits / temperature) over the last axis, in float64; below 1e-5 all mass on the first maximum.

    Raises InvalidParameterError for a negative or infinite temperature, BackendError for a row without a number above
    -inf, or with NaN or +inf.  [MX-SPEC-3]
    """
    if not 0 <= temperature < np.inf:
        raise InvalidParameterError(f"token_distribution: temperature is {temperature}, expected a number >= 0")
    values = np.asarray(logits, dtype=np.float64)
    peaks = values.max(axis=-1, keepdims=True)
    if not np.isfinite(peaks).all():
        raise BackendError("token_distribution: NaN, +inf or no candidate in a row of logits; the forward has failed")
    if temperature < GREEDY_BELOW:
        probabilities = np.zeros_like(values)
        np.put_along_axis(probabilities, values.argmax(axis=-1)[..., None], 1.0, axis=-1)
        return probabilities
    weights = np.exp((values - peaks) / temperature)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def pick(probabilities: Floats, u: Floats, parity_mode: ParityMode = ParityMode.REFERENCE) -> Ints:
    """The first id whose running sum exceeds u * total: `[..., V]`, `[...]` -> `[...]`; its probability is positive.

    u in [0, 1). UPSTREAM takes the first whose running sum reaches u, so that u = 0 picks id 0 even where its
    probability is 0 (D-24).  [MX-SPEC-7]
    """
    sums = np.cumsum(probabilities, axis=-1)
    target = np.asarray(u, dtype=np.float64)[..., None] * sums[..., -1:]
    passed = sums >= target if parity_mode is ParityMode.UPSTREAM else sums > target
    return np.asarray(passed.argmax(axis=-1), dtype=np.int64)


def acceptance_probability(target: Floats, drafts: Ints, draft: Floats | None) -> Floats:
    """min(1, p(x) / q(x)); p(x) for point masses. target, draft `[..., V]`, drafts `[...]` -> `[...]`.  [MX-SPEC-3]"""
    p = np.take_along_axis(target, drafts[..., None], -1)[..., 0]
    if draft is None:
        return p
    q = np.take_along_axis(draft, drafts[..., None], -1)[..., 0]
    return np.minimum(1.0, p / q)


def residual_distribution(target: Floats, drafts: Ints, draft: Floats | None) -> Floats:
    """(p - q)+ / sum (p - q)+ over the last axis; p itself where nothing is left (p = q).  [MX-SPEC-4]"""
    if draft is None:
        rest = target.copy()
        np.put_along_axis(rest, drafts[..., None], 0.0, axis=-1)
    else:
        rest = np.maximum(target - draft, 0.0)
    mass = rest.sum(axis=-1, keepdims=True)
    return np.asarray(np.where(mass > 0, rest / np.where(mass > 0, mass, 1.0), target))


def judge_drafts(
    target: Floats,
    drafts: Ints,
    draft: Floats | None,
    uniforms: Floats,
    parity_mode: ParityMode = ParityMode.REFERENCE,
) -> Verdict:
    """Lossless rejection sampling of N sequences with K drafts each.  [MX-SPEC-3..5]

    target `[N, K+1, V]`; drafts `[N, K]`; draft `[N, K, V]`, or None for point masses; uniforms `[N, K+1]` in [0, 1):
    number i decides on draft i (accepted iff u < p/q), the last draws the token after the accepted ones.
    Raises ShapeError for shapes that do not belong together.
    """
    num, width = drafts.shape
    vocab = target.shape[-1]
    expected = [(num, width + 1, vocab), (num, width + 1), (num, width, vocab)]
    got = [target.shape, uniforms.shape, expected[2] if draft is None else draft.shape]
    if got != expected:
        raise ShapeError(
            f"judge_drafts: target, uniforms, draft are {got} for drafts {drafts.shape}; expected {expected}"
        )
    accepted = uniforms[:, :width] < acceptance_probability(target[:, :width], drafts, draft)
    num_accepted = np.logical_and.accumulate(accepted, axis=1).sum(axis=1)
    rows = np.arange(num)
    final = target[rows, num_accepted].copy()
    rejected = num_accepted < width
    if rejected.any():
        where, at = rows[rejected], num_accepted[rejected]
        own = None if draft is None else draft[where, at]
        final[rejected] = residual_distribution(final[rejected], drafts[where, at], own)
    return Verdict(num_accepted, pick(final, uniforms[:, width], parity_mode))


def greedy_prefix(logits: npt.NDArray[Any], drafts: Ints) -> int:
    """Length of the longest prefix of drafts `[K]` equal to the argmax of logits `[K+1, V]` before it.  [MX-SPEC-1]

    Raises BackendError for NaN, or no candidate in a row.
    """
    values = np.asarray(logits)
    if not (values.max(axis=-1) > -np.inf).all():
        raise BackendError("greedy_prefix: NaN or no candidate in a row of logits; the forward has failed")
    agrees = values[: len(drafts)].argmax(axis=-1) == drafts
    return int(np.logical_and.accumulate(agrees).sum())


def typical_prefix(target: Floats, drafts: Ints, threshold: float) -> int:
    """Length of the longest prefix of drafts `[K]` to each of which target `[K+1, V]` gives >= threshold.  [MX-SPEC-2]

    Biased: what comes out is not distributed as the target says.
    """
    likely = np.take_along_axis(target[: len(drafts)], drafts[:, None], -1)[:, 0] >= threshold
    return int(np.logical_and.accumulate(likely).sum())
