"""err / bound, and everything that is no number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from ferrum_ref.parity.ops.operation import Expected
from ferrum_ref.parity.verdict import judge

VALUE = np.array([[1.0, 2.0], [4.0, 8.0]])
EXPECTED = Expected("y", VALUE, ("row", "column"), np.dtype(np.float32), np.full((2, 2), 0.5), np.full((2, 2), 0.25))


def got(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32).reshape(2, 2)


@pytest.mark.clause("PA-VERDICT-1")
def test_the_worst_element_and_its_coordinates_are_kept() -> None:
    verdict = judge(EXPECTED, got(1.0, 2.1, 4.2, 7.9))
    assert verdict.passed
    assert verdict.coordinates == (("row", 1), ("column", 0))
    assert verdict.ratio_det == pytest.approx(0.4, rel=1e-6)
    assert verdict.ratio_sharp == pytest.approx(0.8, rel=1e-6)
    assert (verdict.expected, verdict.bound) == (4.0, 0.5)


@pytest.mark.clause("PA-VERDICT-1", "PA-TIER-1")
def test_each_tier_can_fail_on_its_own() -> None:
    beyond_sharp = judge(EXPECTED, got(1.0, 2.0, 4.0, 8.3))
    assert not beyond_sharp.passed
    assert "sharp" in beyond_sharp.fault
    assert beyond_sharp.bound == 0.25
    beyond_det = judge(EXPECTED, got(2.0, 2.0, 4.0, 8.3))
    assert "det" in beyond_det.fault
    assert beyond_det.coordinates == (("row", 0), ("column", 0))
    assert judge(dataclasses.replace(EXPECTED, sharp=None), got(1.0, 2.0, 4.0, 8.3)).passed


@pytest.mark.clause("PA-VERDICT-1")
def test_shape_and_element_type_come_first() -> None:
    assert "shape (4,)" in judge(EXPECTED, np.zeros(4, dtype=np.float32)).fault
    assert "float64" in judge(EXPECTED, VALUE).fault
    assert judge(EXPECTED, VALUE).ratio_det == math.inf


@pytest.mark.clause("PA-VERDICT-2")
@pytest.mark.parametrize(
    ("value", "returned", "passes"),
    [
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (math.inf, 3e38, False),
        (3.4028236e38, math.inf, True),  # half a step beyond the largest float32
        (3.4028236e38, 3.4028235e38, True),  # and the largest is within the bound
        (3.4028235e38, math.inf, False),  # the largest float32 itself
        (3.4028235e38, -math.inf, False),
        (1e38, math.inf, False),
        (0.0, -0.0, True),
    ],
)
def test_what_is_no_finite_number(value: float, returned: float, passes: bool) -> None:
    bound = np.array([2.0**-24 * abs(value) if math.isfinite(value) else math.nan])
    expected = Expected("y", np.array([value]), ("i",), np.dtype(np.float32), bound)
    assert judge(expected, np.array([returned], dtype=np.float32)).passed is passes


@pytest.mark.clause("PA-VERDICT-2")
def test_infinity_stands_for_what_its_error_brings_half_a_step_beyond_the_largest() -> None:
    """fp16: 65,504 is the largest, 65,520 rounds to infinity; the store's own 2^-11 |y| does not bring it there."""
    rounding = 2.0**-11 * 65504.0
    for error, passes in ((0.0, False), (15.0, False), (17.0, True)):
        expected = Expected("y", np.array([65504.0]), ("i",), np.dtype(np.float16), np.array([rounding + error]))
        assert judge(expected, np.array([np.inf], dtype=np.float16)).passed is passes


@pytest.mark.clause("PA-VERDICT-3")
@pytest.mark.parametrize(
    ("value", "returned", "passes"),
    [(1.0, 1.0, True), (1.0, 1.0000001, False), (0.0, -0.0, False), (math.nan, math.nan, True), (math.nan, 0.0, False)],
)
def test_exact_operations_agree_bit_for_bit(value: float, returned: float, passes: bool) -> None:
    expected = Expected("y", np.array([value], dtype=np.float32), ("i",), np.dtype(np.float32))
    verdict = judge(expected, np.array([returned], dtype=np.float32))
    assert verdict.passed is passes
    assert verdict.ratio_det == (0.0 if passes else math.inf)
    assert verdict.ratio_sharp is None


@pytest.mark.clause("PA-VERDICT-4")
def test_a_declaration_that_bounds_nothing_cannot_be_kept() -> None:
    expected = dataclasses.replace(EXPECTED, det=np.full((2, 2), np.inf), sharp=None)
    assert "bounds nothing" in judge(expected, got(1.0, 2.0, 4.0, 8.1)).fault
    assert judge(dataclasses.replace(expected, det=np.full((2, 2), np.nan)), got(1.0, 2.0, 4.0, 8.1)).fault


@pytest.mark.clause("PA-REPORT-6")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y[:, 64:].fill(0), "24 of 280 elements are wrong: every row, feature 64..69; all of them are 0"),
        (lambda y: y[1, ::2].fill(np.nan), "35 of 280 elements are wrong: row 1, feature 0..68 in steps of 2; all of"),
        (lambda y: np.multiply(y[2:4], 0.5, out=y[2:4]), "row 2..3, every feature; got / expected is 0.5 in all of"),
        (lambda y: np.multiply(y, 2.0, out=y), "all 280 elements are wrong; got / expected is 2 in all of them"),
        (lambda y: y[[0, 0, 3, 1], [2, 3, 9, 50]].__iadd__(0), ""),
        (lambda y: y.__setitem__((0, 5), 9.0), "1 of 280 elements is wrong: row 0, feature 5"),
        (
            lambda y: y.__setitem__((0, [2, 3, 9]), [8.0, 9.0, 8.5]),
            "3 of 280 elements are wrong: row 0, feature 2, 3, 9",
        ),
        (lambda y: y.__setitem__((0, [2, 3, 9, 20, 22]), np.arange(8.0, 13.0)), "row 0, 5 of 70 in feature 2..22"),
    ],
)
def test_which_elements_are_wrong_stands_in_words(change: Callable[[np.ndarray], object], said: str) -> None:
    value = np.random.default_rng(0).standard_normal((4, 70)).astype(np.float32).astype(np.float64)
    expected = Expected("y", value, ("row", "feature"), np.dtype(np.float32), 1e-6 * np.abs(value))
    changed = value.astype(np.float32)
    change(changed)
    verdict = judge(expected, changed)
    assert verdict.passed is (not said)
    assert said in verdict.extent


@pytest.mark.clause("PA-REPORT-6")
def test_exact_results_and_single_numbers_have_an_extent_of_their_own() -> None:
    ids = Expected("ids", np.array([3, 4, 5]), ("token",), np.dtype(np.int64))
    assert judge(ids, np.array([3, 9, 9])).extent == "2 of 3 elements are wrong: token 1..2"
    one = Expected("index", np.array(3), (), np.dtype(np.int64))
    assert judge(one, np.array(4)).extent == ""


def test_empty_and_scalar_outputs() -> None:
    empty = Expected("y", np.zeros((0, 3)), ("row", "column"), np.dtype(np.float32), np.zeros((0, 3)))
    assert judge(empty, np.zeros((0, 3), dtype=np.float32)).passed
    index = Expected("index", np.array(3), (), np.dtype(np.int64))
    assert judge(index, np.array(3)).passed
    wrong = judge(index, np.array(4))
    assert (wrong.passed, wrong.expected, wrong.got) == (False, 3.0, 4.0)
