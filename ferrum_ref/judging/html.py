"""One self-contained page: the matrix of cells, the worst cases as heat maps, how to run them again.

Clauses: PA-HTML-1..3 (specs/judging.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np

from ferrum_ref.parity.cells import Cell, failures_in_turn
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.report import case_lines, summary_line
from ferrum_ref.parity.runner import FAILED, CaseResult, draw_case
from ferrum_ref.parity.subject import Subject
from ferrum_ref.parity.units import Array, storage_named

MAX_MAPS: Final = 12
MAP_ROWS, MAP_COLUMNS = 48, 96
TEMPLATE: Final = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True, slots=True)
class HeatMap:
    """err / bound over one output, the largest of each box of elements.

    values: rows of at most 96 columns, None where a ratio is not finite; shape: of the output itself.
    """

    output: str
    shape: tuple[int, ...]
    values: list[list[float | None]]

    @property
    def largest(self) -> float:
        return max((value for row in self.values for value in row if value is not None), default=0.0)


def html_page(title: str, cells: Sequence[Cell], subject: Subject | None, remarks: Sequence[str] = ()) -> str:
    """The report as one page without anything to fetch.  [PA-HTML-1..3]

    With a subject, its failures, or else its worst cases, are run once more and drawn. Text of the subject is escaped.
    """
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    names = list(dict.fromkeys(cell.operation for cell in cells))
    matrix = [
        (
            name,
            [
                next((_tile(cell) for cell in cells if (cell.operation, cell.dtype) == (name, dtype)), None)
                for dtype in dtypes
            ],
        )
        for name in names
    ]
    cases = [
        (_title(result), case_lines(result), result.reproduce, maps_of(subject, result))
        for result in worst_cases(cells)
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(
        title=title, summary=summary_line(cells), dtypes=dtypes, matrix=matrix, cases=cases, remarks=list(remarks)
    )


def worst_cases(cells: Sequence[Cell]) -> list[CaseResult]:
    """Every failure, or the cases nearest to their bound where nothing failed; at most 12. Pure."""
    if failures := failures_in_turn(cells):
        return failures[:MAX_MAPS]
    rated = [cell.worst for cell in cells if cell.worst is not None and math.isfinite(cell.worst.ratio_det)]
    return sorted(rated, key=lambda result: -result.ratio_det)[:MAX_MAPS]


def maps_of(subject: Subject | None, result: CaseResult) -> list[HeatMap]:
    """The case once more, err / bound drawn for each bounded output; nothing where there is nothing to draw."""
    if subject is None or (result.status == FAILED and result.verdict is None):
        return []
    operation, storage = operation_named(result.operation), storage_named(result.dtype)
    inputs = draw_case(operation, storage, result.case_index, result.seed)
    try:
        with np.errstate(all="ignore"):
            expected = operation.expect(inputs, subject.declared(operation))
            outputs = subject.run(operation, inputs)
    except Exception:  # noqa: BLE001  whatever a subject raises: the words of the first run stand on the page
        return []
    return [
        HeatMap(wanted.name, got.shape, boxes(_ratios(wanted.value, got, wanted.det)))
        for wanted, got in zip(expected, outputs, strict=False)
        if wanted.det is not None and got.shape == wanted.value.shape and got.size
    ]


def _ratios(value: Array, got: Array, bound: Array) -> Array:
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(np.float64) - value.astype(np.float64))
        ratios = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isnan(value) & np.isnan(got.astype(np.float64)), 0.0, ratios)


def boxes(ratios: Array) -> list[list[float | None]]:
    """The array seen as (everything before the last axis, last axis), the largest ratio of each box of it. Pure."""
    flat = ratios.reshape(-1, ratios.shape[-1]) if ratios.ndim else ratios.reshape(1, 1)
    rows = np.array_split(np.arange(flat.shape[0]), min(MAP_ROWS, flat.shape[0]))
    columns = np.array_split(np.arange(flat.shape[1]), min(MAP_COLUMNS, flat.shape[1]))
    wide = np.nan_to_num(flat, nan=np.inf, posinf=np.inf)
    found = [[float(wide[np.ix_(row, column)].max()) for column in columns] for row in rows]
    return [[value if math.isfinite(value) else None for value in row] for row in found]


def _tile(cell: Cell) -> dict[str, Any]:
    """What one cell of the matrix shows."""
    ratios = {
        "det": cell.ratio_det, "prob": cell.ratio_prob, "sharp": cell.ratio_sharp, "statistical": cell.ratio_statistical
    }  # fmt: skip
    shown = {
        tier: "inf" if not math.isfinite(ratio) else f"{ratio:.3g}"
        for tier, ratio in ratios.items()
        if ratio is not None
    }
    return {
        "status": cell.status,
        "tiers": shown,
        "counts": ", ".join(f"{count} {status}" for status, count in cell.counts.items() if count),
        "reason": cell.reason,
    }


def _title(result: CaseResult) -> str:
    return f"{result.operation} {result.dtype} case {result.case_index} seed {result.seed}: {result.label}"
