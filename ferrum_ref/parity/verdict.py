"""err / bound of every element of an output, and where the worst of it lies.

Clauses: PA-VERDICT-1..5, PA-TIER-1..4, PA-REPORT-6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ferrum_ref.parity.choices import draw_tests
from ferrum_ref.parity.error_model import DET, PROB, SHARP
from ferrum_ref.parity.extent import extent_of, likeness_of
from ferrum_ref.parity.ops.operation import Expected
from ferrum_ref.parity.statistical import common_factor_ratio, statistical_ratio
from ferrum_ref.parity.units import Array

STATISTICAL = "statistical"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement on one output.

    ratio_*: largest err / bound of a tier (0 for empty or exact outputs that agree; inf when nothing finite can be
    said; None when the tier does not apply); ratio_statistical compares many elements with their common ceiling. The
    other fields describe the worst element of the first tier that failed, or of the det tier: its coordinates by axis
    name, expected, got and bound; `fault` is "" for a pass; `extent` says which elements are wrong, and what they have
    in common.
    """

    output: str
    ratio_det: float
    ratio_sharp: float | None
    fault: str = ""
    coordinates: tuple[tuple[str, int], ...] = ()
    expected: float = 0.0
    got: float = 0.0
    bound: float = 0.0
    ratio_prob: float | None = None
    ratio_statistical: float | None = None
    extent: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault


def judge(expected: Expected, got: Array) -> Verdict:
    """The verdict on `got`: shape, element type, then every element within every bound. Pure.  [PA-VERDICT-1..5]"""
    if got.shape != expected.value.shape:
        return _refused(expected, f"shape {got.shape}, expected {expected.value.shape}")
    if got.dtype != expected.dtype:
        return _refused(expected, f"element type {got.dtype}, expected {expected.dtype}: store the result as that")
    if expected.choice is not None:
        return _judge_choice(expected, got)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = got.astype(np.float64)
    if expected.det is None:
        return _judge_exact(expected, values)
    return _judge_bounded(expected, values, expected.det)


def _judge_bounded(expected: Expected, values: Array, det: Array) -> Verdict:
    bounds = {DET: det, PROB: expected.prob, SHARP: expected.sharp}
    ratios = {tier: _ratios(expected, values, bound) for tier, bound in bounds.items() if bound is not None}
    worst = {tier: _worst(found) for tier, found in ratios.items()}
    failed = next((tier for tier, ratio in worst.items() if not ratio <= 1.0), None)
    shown = failed or DET
    bound = np.asarray(bounds[shown])
    verdict = _describe(expected, values, ratios[shown], bound)
    fault = "" if failed is None else f"err/bound is {worst[failed]:.3g} in tier {failed}"
    statistical = None
    if expected.reach is not None and expected.storage is not None:
        statistical = statistical_ratio(expected.storage, expected.value, values, expected.reach)
        if not fault and not statistical <= 1.0:
            fault = (
                f"the elements err {statistical:.3g} times as much together as one rounding at the end allows, "
                f"in tier {STATISTICAL}: an intermediate is rounded that was not declared"
            )
    if expected.factor is not None:
        statistical = common_factor_ratio(expected.value, values, expected.factor)
        if not fault and not statistical <= 1.0:
            fault = (
                f"a factor that all elements share lies {statistical:.3g} times as far from 1 as independent roundings "
                f"can move it, in tier {STATISTICAL}"
            )
    if ratios[shown].size and not np.isfinite(bound[_index(verdict)]) and np.isfinite(verdict.expected):
        fault = "the declared algorithm bounds nothing here: its accumulator is too coarse for so long a sum"
    return replace(
        verdict,
        ratio_det=worst[DET],
        ratio_prob=worst.get(PROB),
        ratio_sharp=worst.get(SHARP),
        ratio_statistical=statistical,
        fault=fault,
    )


def _judge_choice(expected: Expected, drawn: Array) -> Verdict:
    """Every index admissible, and all of them together from their distribution.  [PA-VERDICT-5]"""
    choice = expected.choice
    ratios = np.zeros(drawn.shape) if choice is None else np.where(choice.admits(drawn), 0.0, np.inf)
    worst = _worst(ratios)
    verdict = _describe(expected, drawn.astype(np.float64), ratios, np.zeros(ratios.shape))
    fault = "" if worst == 0.0 else f"{np.count_nonzero(ratios)} of {drawn.size} draws are not admissible"
    statistical = None
    if expected.law is not None:
        tests = draw_tests(expected.law, drawn)
        name, statistical = max(tests.items(), key=lambda item: item[1])
        if not fault and not statistical <= 1.0:
            fault = f"the draws do not follow their distribution: {statistical:.3g} times the critical value ({name})"
    return replace(verdict, ratio_det=worst, ratio_statistical=statistical, fault=fault)


def _refused(expected: Expected, fault: str) -> Verdict:
    return Verdict(expected.name, float("inf"), None, fault)


def _judge_exact(expected: Expected, values: Array) -> Verdict:
    """Bit for bit: NaN agrees with NaN, and the sign of zero counts."""
    with np.errstate(invalid="ignore"):
        targets = expected.value.astype(np.float64)
    same = (values == targets) & (np.signbit(values) == np.signbit(targets)) | (np.isnan(values) & np.isnan(targets))
    ratios = np.where(same, 0.0, np.inf)
    worst = _worst(ratios)
    verdict = _describe(expected, values, ratios, np.zeros(ratios.shape))
    fault = "" if worst == 0.0 else "the operation is exact, the result differs"
    return replace(verdict, ratio_det=worst, fault=fault)


def _ratios(expected: Expected, got: Array, bound: Array) -> Array:
    """|got - y| / B; NaN and infinities must be matched, an infinity also stands for a value that may round to it.

    Only what lies half a step or more beyond the largest number rounds to infinity.  [PA-VERDICT-2]
    """
    value = expected.value
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - value)
        ratios = np.where(error == 0.0, 0.0, np.where(np.isfinite(bound), error / bound, np.inf))
        info: Any = ml_dtypes.finfo(expected.dtype)  # type: ignore[no-untyped-call]
        beyond = float(info.max) * (1.0 + float(info.eps) / 4.0)  # the middle between it and the next, or just below
        stores = bound >= float(info.eps) / 2.0 * np.abs(value)  # the bound holds a rounding of the store itself
        reach = bound - np.where(stores, float(info.eps) / 2.0 * np.abs(value), 0.0)
        overflows = np.isinf(got) & (np.sign(got) * value + reach >= beyond)
    ratios = np.where(np.isfinite(got) | overflows, np.where(overflows, 0.0, ratios), np.inf)
    matched = (np.isnan(value) & np.isnan(got)) | (np.isinf(value) & (got == value))
    decided: Array = np.where(np.isfinite(value), ratios, np.where(matched, 0.0, np.inf))
    return decided


def _worst(ratios: Array) -> float:
    return float(ratios.max()) if ratios.size else 0.0


def _describe(expected: Expected, got: Array, ratios: Array, bound: Array) -> Verdict:
    if not ratios.size:
        return Verdict(expected.name, 0.0, None)
    place = np.unravel_index(int(ratios.argmax()), ratios.shape)
    coordinates = tuple((axis, int(position)) for axis, position in zip(expected.axes, place, strict=True))
    value = float(np.asarray(expected.value)[place])
    return Verdict(
        expected.name,
        0.0,
        None,
        "",
        coordinates,
        value,
        float(got[place]),
        float(np.asarray(bound)[place]),
        extent=_extent(expected, got, ~(ratios <= 1.0)),
    )


def _extent(expected: Expected, got: Array, wrong: Array) -> str:
    """Which elements are wrong, and what they have in common where they are numbers of a floating-point type."""
    where = extent_of(wrong, expected.axes)
    if not where or expected.dtype.kind in "iu":
        return where
    with np.errstate(invalid="ignore"):
        value = np.asarray(expected.value).astype(np.float64)
    unit = float(ml_dtypes.finfo(expected.dtype).eps)  # type: ignore[no-untyped-call]
    return "; ".join(filter(None, (where, likeness_of(value, got, wrong, unit))))


def _index(verdict: Verdict) -> tuple[int, ...]:
    return tuple(position for _, position in verdict.coordinates)
