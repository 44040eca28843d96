"""Where do two runs of one checkpoint part?  The yardstick is what the other program's own float32 loses.

A layer stays inside while  ||ours - wide|| / ||wide|| <= 4 ||narrow - wide|| / ||wide||,  wide and narrow being the
other program's float64 and float32 runs of the same tokens.  Clauses: VE-COMPARE-1..4 (specs/verify.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ShapeError

Array = npt.NDArray[Any]
FLOOR_FACTOR: Final = 4.0  # an honest float32 run of another order of operations loses that much more at most


@dataclass(frozen=True, slots=True)
class Run:
    """What one program computed: points by name, in forward order ("layers.0.hidden" `[T, E]`, ..., "logits" `[T, V]`),
    and the tokens it would go on with.
    """

    points: Mapping[str, Array]
    greedy: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PointComparison:
    """Errors at one named point, relative to the float64 run's norm.  [VE-COMPARE-1]"""

    name: str
    error: float
    floor: float
    row: int | None  # the token with the largest error, None where all agree exactly

    @property
    def times_floor(self) -> float:
        """error / floor; infinite where only the floor is 0, and where the error is not a number."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.floor if self.floor > 0.0 and np.isfinite(self.error) else float("inf")

    @property
    def inside(self) -> bool:
        return self.times_floor <= FLOOR_FACTOR


@dataclass(frozen=True, slots=True)
class Verification:
    """The comparison of one checkpoint.  [VE-COMPARE-2..4]

    logits_error, logits_floor: largest absolute errors. greedy_prefix: how many of greedy_expected were also our
    choice; margin: by how much the float64 run's choice led where we first chose otherwise, None where we never did.
    """

    points: tuple[PointComparison, ...]
    logits_error: float
    logits_floor: float
    greedy_prefix: int
    greedy_expected: tuple[int, ...]
    margin: float | None = None
    faults: tuple[str, ...] = field(default=())

    @property
    def first_outside(self) -> str | None:
        """The first point outside the noise floor."""
        return next((point.name for point in self.points if not point.inside), None)

    @property
    def passed(self) -> bool:
        return not self.faults


def compare(ours: Run, wide: Run, narrow: Run, margins: Sequence[float] = ()) -> Verification:
    """Our run against a float64 run, with a float32 run of the same program as noise floor.  [VE-COMPARE-1..4]

    margins: for each token of wide.greedy, by how much its logit led our runner-up's (a lead within the noise decides
    nothing). Pure.  Raises ShapeError where a point has different shapes.
    """
    points = [_point(name, ours.points[name], wide.points[name], narrow.points[name]) for name in wide.points]
    logits = wide.points["logits"].astype(np.float64)
    error = _largest(ours.points["logits"] - logits)
    floor = _largest(narrow.points["logits"] - logits)
    prefix = next(
        (number for number, pair in enumerate(zip(ours.greedy, wide.greedy, strict=True)) if pair[0] != pair[1]),
        len(wide.greedy),
    )
    margin = margins[prefix] if prefix < min(len(margins), len(wide.greedy)) else None
    faults = []
    outside = next((point for point in points if not point.inside), None)
    if outside is not None:
        faults.append(
            f"{outside.name} is the first point outside the float32 noise floor: relative error {outside.error:.3g},"
            f" {outside.times_floor:.3g} times transformers' own float32 error"
            + (f", largest at token {outside.row}" if outside.row is not None else "")
        )
    if not error <= FLOOR_FACTOR * floor:
        faults.append(f"logits err by {error:.3g}, transformers' own float32 by {floor:.3g}")
    if prefix < len(wide.greedy) and not (margin is not None and margin <= 2.0 * FLOOR_FACTOR * floor):
        faults.append(f"greedy text differs after {prefix} of {len(wide.greedy)} tokens")
    return Verification(tuple(points), error, floor, prefix, wide.greedy, margin, tuple(faults))


def _point(name: str, ours: Array, wide: Array, narrow: Array) -> PointComparison:
    if ours.shape != wide.shape or narrow.shape != wide.shape:
        raise ShapeError(f"verify: {name}: got shape {list(ours.shape)} here, {list(wide.shape)} from transformers")
    exact = wide.astype(np.float64)
    difference = ours.astype(np.float64) - exact
    norm = float(np.linalg.norm(exact)) or 1.0
    by_row = np.linalg.norm(difference, axis=-1)
    bad = ~np.isfinite(by_row)
    row = int(bad.argmax()) if bad.any() else int(by_row.argmax()) if by_row.any() else None
    error = float("inf") if bad.any() else float(np.linalg.norm(difference)) / norm
    return PointComparison(name, error, float(np.linalg.norm(narrow - exact)) / norm, row)


def _largest(difference: Array) -> float:
    return float(np.abs(difference).max()) if np.isfinite(difference).all() else float("inf")
