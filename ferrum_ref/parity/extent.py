"""Which elements of a result are wrong, in words: the pattern often names the bug.

    7 of 210 elements are wrong: every row, feature 64..70; all of them are 0

A tail says a tile that does not divide, every second feature a pairing, one factor in all of them a scale.
Clause: PA-REPORT-6.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.parity.units import Array

LISTED = 4  # so many places of an axis are named one by one
NEAR_UNITS = 4.0  # units within which factors are one, and within which a factor is 1 but for roundings
LEAST_ALIKE = 3  # fewer elements have a factor in common by chance


def extent_of(wrong: Array, axes: Sequence[str]) -> str:
    """How many of the elements are wrong, and where along each axis; "" for none or a single element. Pure.

    wrong: bool, of the output's shape; axes: the names of its axes.
    """
    count = int(np.count_nonzero(wrong))
    if count == 0 or wrong.size == 1:
        return ""
    if count == wrong.size:
        return f"all {count} elements are wrong"
    places = [
        _along(name, np.flatnonzero(wrong.any(axis=tuple(other for other in range(wrong.ndim) if other != axis))), size)
        for axis, (name, size) in enumerate(zip(axes, wrong.shape, strict=True))
        if size > 1
    ]
    verb = "is" if count == 1 else "are"
    return f"{count} of {wrong.size} elements {verb} wrong: {', '.join(places)}"


def _along(axis: str, places: Array, size: int) -> str:
    """The places of one axis that hold anything wrong: all, a range, every k-th, a few by name, or how many."""
    first, last = int(places[0]), int(places[-1])
    if places.size == size:
        return f"every {axis}"
    if places.size == 1:
        return f"{axis} {first}"
    if places.size == last - first + 1:
        return f"{axis} {first}..{last}"
    steps = np.diff(places)
    if places.size >= LEAST_ALIKE and np.all(steps == steps[0]):
        return f"{axis} {first}..{last} in steps of {int(steps[0])}"
    if places.size <= LISTED:
        return f"{axis} {', '.join(str(int(place)) for place in places)}"
    return f"{places.size} of {size} in {axis} {first}..{last}"


def likeness_of(value: Array, got: Array, wrong: Array, unit: float) -> str:
    """What the wrong elements have in common: NaN, one number, or one factor of the expected value; else "". Pure.

    value, got: float64, of one shape; unit: the roundoff within which factors are one, that of the result's type.
    """
    expected, found = value[wrong], got[wrong]
    if found.size < LEAST_ALIKE:
        return ""
    if np.all(np.isnan(found)):
        return "all of them are NaN"
    if np.all(found == found[0]):
        return f"all of them are {found[0]:.6g}"
    with np.errstate(all="ignore"):
        factors = found / expected
        middle = float(np.median(factors))
        alike = np.all(np.abs(factors - middle) <= NEAR_UNITS * unit * abs(middle))
    rounding = abs(middle - 1.0) <= NEAR_UNITS * unit
    return f"got / expected is {middle:.6g} in all of them" if alike and not rounding else ""
