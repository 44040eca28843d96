"""The statistical tier: many results together, where each alone stays within its bound.

A result that is rounded once to its storage type errs by what that rounding errs, and an accumulator's error e moves it
at most to a neighbour. So the root mean square of err / (u_s |y|) has a ceiling that follows from y and e alone. One
undeclared extra rounding raises it by about the square root of two.  Clauses: PA-TIER-4..5.
"""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.error_model import ACCUMULATOR_BITS, ErrorModel
from ferrum_ref.parity.units import Array, Storage

MIN_RESULTS = 16  # fewer say nothing together that each does not say alone


def reach_of(model: ErrorModel, value: Array, error: Array) -> Array | None:
    """w = max(|fl(y - e) - y|, |fl(y + e) - y|): how far one stored result may lie from y. Pure.

    Rounding is monotone, so a result fl(z) with |z - y| <= e lies between fl(y - e) and fl(y + e). NaN where y is below
    the normal range or not finite, or may round to infinity; None where the tier does not apply: the storage type is no
    coarser than the accumulator, its subnormals are flushed, or there are fewer than 16 such results.
    """
    storage = model.storage
    if ACCUMULATOR_BITS[model.algorithm.accumulate] <= storage.precision_bits or model.algorithm.flushes_subnormals:
        return None
    with np.errstate(all="ignore"):
        ends = (storage.round(value - error).astype(np.float64), storage.round(value + error).astype(np.float64))
        reach = np.maximum(np.abs(ends[0] - value), np.abs(ends[1] - value))
        usable = np.isfinite(reach) & (np.abs(value) >= storage.smallest_normal)
    if np.count_nonzero(usable) < MIN_RESULTS:
        return None
    return np.where(usable, reach, np.nan)


def statistical_ratio(storage: Storage, value: Array, got: Array, reach: Array) -> float:
    """rms(err / (u_s |y|)) over rms(w / (u_s |y|)); infinite for a result that is no number. Pure."""
    usable = np.isfinite(reach)
    scale = storage.unit * np.abs(value[usable])
    errors, ceilings = np.abs(got[usable] - value[usable]) / scale, reach[usable] / scale
    if not np.all(np.isfinite(errors)):
        return float("inf")
    ceiling = float(np.sqrt(np.mean(np.square(ceilings))))
    error = float(np.sqrt(np.mean(np.square(errors))))
    return error / ceiling if ceiling > 0.0 else (0.0 if error == 0.0 else float("inf"))


def common_factor_ratio(value: Array, got: Array, bound: float) -> float:
    """|sum y (got - y)| / sum y^2 over its bound; infinite for results that are no numbers. Pure.  [PA-TIER-5]"""
    with np.errstate(all="ignore"):
        moved = abs(float(np.sum(value * (got - value)) / np.sum(np.square(value))))
    if not np.isfinite(moved):
        return float("inf")
    return moved / bound if bound > 0.0 else (0.0 if moved == 0.0 else float("inf"))
