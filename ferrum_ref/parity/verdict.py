"""err / bound of every element of an output, and where the worst of it lies.  Clauses: PA-VERDICT-1..4."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ferrum_ref.parity.ops.operation import Expected
from ferrum_ref.parity.units import Array


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement on one output.

    ratio_det, ratio_sharp: largest err / bound of a tier (0 for empty or exact outputs that agree; inf when nothing
    finite can be said; None when the tier does not apply). The other fields describe the worst element of the tier that
    failed, or of the det tier: its coordinates by axis name, expected, got and bound; `fault` is "" for a pass.
    """

    output: str
    ratio_det: float
    ratio_sharp: float | None
    fault: str = ""
    coordinates: tuple[tuple[str, int], ...] = ()
    expected: float = 0.0
    got: float = 0.0
    bound: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.fault


def judge(expected: Expected, got: Array) -> Verdict:
    """The verdict on `got`: shape, element type, then every element within every bound. Pure.  [PA-VERDICT-1..4]"""
    if got.shape != expected.value.shape:
        return _refused(expected, f"shape {got.shape}, expected {expected.value.shape}")
    if got.dtype != expected.dtype:
        return _refused(expected, f"element type {got.dtype}, expected {expected.dtype}")
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = got.astype(np.float64)
    if expected.det is None:
        return _judge_exact(expected, values)
    ratios = _ratios(expected, values, expected.det)
    worst_det = _worst(ratios)
    worst_sharp, tier, bound = None, "det", expected.det
    if expected.sharp is not None:
        sharp_ratios = _ratios(expected, values, expected.sharp)
        worst_sharp = _worst(sharp_ratios)
        if worst_det <= 1.0 < worst_sharp:
            ratios, tier, bound = sharp_ratios, "sharp", expected.sharp
    verdict = _describe(expected, values, ratios, bound)
    largest = max(worst_det, worst_sharp or 0.0)
    fault = "" if largest <= 1.0 else f"err/bound is {largest:.3g} in tier {tier}"
    if ratios.size and not np.isfinite(bound[_index(verdict)]) and np.isfinite(verdict.expected):
        fault = "the declared algorithm bounds nothing here: its accumulator is too coarse for so long a sum"
    return _with(verdict, worst_det, worst_sharp, fault)


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
    return _with(verdict, worst, None, "" if worst == 0.0 else "the operation is exact, the result differs")


def _ratios(expected: Expected, got: Array, bound: Array) -> Array:
    """|got - y| / B; NaN and infinities must be matched, an infinity also stands for a value that may round to it."""
    value = expected.value
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - value)
        ratios = np.where(error == 0.0, 0.0, np.where(np.isfinite(bound), error / bound, np.inf))
        largest = float(ml_dtypes.finfo(expected.dtype).max)  # type: ignore[no-untyped-call]
        overflows = np.isinf(got) & (np.sign(got) * value + bound > largest)
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
    return Verdict(expected.name, 0.0, None, "", coordinates, value, float(got[place]), float(np.asarray(bound)[place]))


def _index(verdict: Verdict) -> tuple[int, ...]:
    return tuple(position for _, position in verdict.coordinates)


def _with(verdict: Verdict, ratio_det: float, ratio_sharp: float | None, fault: str) -> Verdict:
    return Verdict(
        verdict.output,
        ratio_det,
        ratio_sharp,
        fault,
        verdict.coordinates,
        verdict.expected,
        verdict.got,
        verdict.bound,
    )
