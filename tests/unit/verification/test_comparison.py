"""Where two runs part, on numbers made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ferrum_ref.errors import ShapeError
from ferrum_ref.verification.comparison import FLOOR_FACTOR, PointComparison, Run, Verification, compare
from ferrum_ref.verification.report import as_json, as_lines, as_table


def run_of(logits: list[list[float]], greedy: tuple[int, ...] = (), **layers: list[list[float]]) -> Run:
    points = {name.replace("_", "."): np.array(rows) for name, rows in layers.items()}
    return Run({**points, "logits": np.array(logits)}, greedy)


@pytest.mark.clause("VE-COMPARE-1")
def test_the_example_of_the_clause() -> None:
    found = compare(run_of([[3, 4 + 1e-6]]), run_of([[3, 4]]), run_of([[3, 4 + 5e-7]]))
    (point,) = found.points
    assert point.error == pytest.approx(2e-7)
    assert point.floor == pytest.approx(1e-7)
    assert point.times_floor == pytest.approx(2)
    assert point.inside
    assert found.passed


@pytest.mark.clause("VE-COMPARE-1")
def test_the_limit_is_four_floors() -> None:
    assert FLOOR_FACTOR == 4
    assert PointComparison("x", 4e-7, 1e-7, 0).inside
    assert not PointComparison("x", 4.001e-7, 1e-7, 0).inside
    assert PointComparison("x", 0.0, 0.0, None).inside
    assert not PointComparison("x", 1e-30, 0.0, 0).inside


@pytest.mark.clause("VE-COMPARE-1")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_outside(bad: float) -> None:
    found = compare(run_of([[1, 2], [bad, 4]]), run_of([[1, 2], [3, 4]]), run_of([[1, 2], [3, 4.1]]))
    assert found.first_outside == "logits"
    assert found.points[0].row == 1
    assert not found.passed
    assert as_json(found)["points"][0]["error"] is None
    json.dumps(as_json(found), allow_nan=False)


@pytest.mark.clause("VE-COMPARE-1")
def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match=r"logits: got shape \[1, 3\] here, \[1, 2\] from transformers"):
        compare(run_of([[1, 2, 3]]), run_of([[1, 2]]), run_of([[1, 2]]))


@pytest.mark.clause("VE-COMPARE-2")
def test_the_first_layer_outside_is_named_with_its_token() -> None:
    wide = run_of([[1.0, 2]], layers_0=[[1, 2], [3, 4]], layers_1=[[1, 2], [3, 4]], layers_2=[[1, 2], [3, 4]])
    narrow = Run({name: values + 1e-7 for name, values in wide.points.items()})
    off = {name: values + 1e-7 for name, values in wide.points.items()}
    off["layers.1"] = wide.points["layers.1"] + np.array([[0, 0], [0, 1e-3]])
    off["layers.2"] = wide.points["layers.2"] + 1e-2
    found = compare(Run(off), wide, narrow)
    assert found.first_outside == "layers.1"
    assert "layers.1 is the first point outside" in found.faults[0]
    assert "largest at token 1" in found.faults[0]
    rows = [str(cell) for cell in as_table(found, "t").columns[0].cells]
    assert any("first outside" in row and "layer 1" in row for row in rows)


@pytest.mark.clause("VE-COMPARE-3")
def test_one_bad_logit_among_many_is_a_fault() -> None:
    """Its share of the norm is within the floor, its own error is not."""
    wide = np.ones((4, 1000))
    narrow, ours = wide + 1e-6, wide.copy()
    ours[2, 7] += 1e-5
    found = compare(Run({"logits": ours}), Run({"logits": wide}), Run({"logits": narrow}))
    assert found.first_outside is None
    assert [fault.partition(",")[0] for fault in found.faults] == ["logits err by 1e-05"]


@pytest.mark.clause("VE-COMPARE-4")
@pytest.mark.parametrize(("lead", "passes"), [(8e-6, True), (1e-5, False)])
def test_another_token_is_a_fault_unless_the_noise_decides(lead: float, passes: bool) -> None:
    wide, narrow = run_of([[1.0, 2]], (5, 6, 7)), run_of([[1.0, 2 + 1.001e-6]])
    found = compare(run_of([[1.0, 2]], (5, 9, 7)), wide, narrow, (1.0, lead, 1.0))
    assert found.greedy_prefix == 1
    assert found.margin == lead
    assert found.passed is passes
    assert (found.faults == ("greedy text differs after 1 of 3 tokens",)) is not passes


@pytest.mark.clause("VE-REPORT-1")
def test_the_table_shows_what_says_most_or_everything() -> None:
    points = tuple(PointComparison(f"layers.{i}.hidden", (1 + (i == 3)) * 1e-7, 1e-7, 0) for i in range(9))
    found = Verification((*points, PointComparison("logits", 1e-7, 1e-7, 0)), 1e-5, 1e-5, 2, (1, 2))
    shown = [str(cell) for cell in as_table(found, "t").columns[0].cells]
    assert shown == ["layer 0", "layer 3 (worst)", "layer 8", "logits"]
    assert len(list(as_table(found, "t", every_layer=True).columns[0].cells)) == 10
    assert as_lines(found)[1] == "greedy text: 2 of 2 tokens are transformers' float64 choice"
    facts = as_json(found)
    assert [point["ratio"] for point in facts["points"]].count(pytest.approx(2.0)) == 1
    assert facts["status"] == "passed"
    assert facts["first_outside"] is None
