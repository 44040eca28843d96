"""The parity table, its failures in words, and the same as JSON.  Clauses: PA-REPORT-1..4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ferrum_ref.parity.cells import STATUSES, Cell
from ferrum_ref.parity.invariance import Invariance
from ferrum_ref.parity.runner import FAILED, PASSED, SKIPPED, UNSUPPORTED, WAIVED, CaseResult

LITTLE_BEYOND = 4.0  # err/bound below which the arithmetic is suspected first, above which the computation
MARKS = {UNSUPPORTED: "unsupp.", SKIPPED: "skipped", WAIVED: "waived"}


def parity_table(cells: Sequence[Cell], title: str) -> Table:
    """One row for each operation; for each dtype the worst err/bound of the four tiers."""
    table = Table(title=title, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("operation", no_wrap=True)
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    for dtype in dtypes:
        table.add_column(f"{dtype} det", justify="right", no_wrap=True)
        for tier in ("prob", "sharp", "stat"):
            table.add_column(tier, justify="right", no_wrap=True)
    table.add_column("cases", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in dict.fromkeys(cell.operation for cell in cells):
        row = {cell.dtype: cell for cell in cells if cell.operation == name}
        figures = [figure for dtype in dtypes for figure in _figures(row.get(dtype))]
        table.add_row(name, *figures, _counted(list(row.values())), _verdict(list(row.values())))
    return table


def _figures(cell: Cell | None) -> tuple[Text, ...]:
    empty = Text("")
    if cell is None:
        return empty, empty, empty, empty
    if cell.ratio_det is None:
        return Text(MARKS[cell.status], style="yellow"), empty, empty, empty
    if cell.worst is not None and cell.worst.verdict is not None and cell.worst.verdict.bound == 0.0 == cell.ratio_det:
        return Text("exact"), empty, empty, empty if cell.ratio_statistical is None else _ratio(cell.ratio_statistical)
    return tuple(_ratio(ratio) for ratio in (cell.ratio_det, cell.ratio_prob, cell.ratio_sharp, cell.ratio_statistical))


def _ratio(ratio: float | None) -> Text:
    if ratio is None:
        return Text("-", style="dim")
    text = f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1e}"
    return Text(text, style="bold red" if ratio > 1.0 else "")


def _counted(cells: Sequence[Cell]) -> str:
    done = sum(cell.counts[PASSED] for cell in cells)
    return f"{done}/{sum(cell.num_cases for cell in cells)}"


def _verdict(cells: Sequence[Cell]) -> Text:
    states = {cell.status for cell in cells}
    if FAILED in states:
        return Text("FAILED", style="bold red")
    if states == {PASSED}:
        partly = any(cell.counts[UNSUPPORTED] + cell.counts[SKIPPED] + cell.counts[WAIVED] for cell in cells)
        return Text("passed, in part" if partly else "passed", style="green")
    for status in (UNSUPPORTED, WAIVED):
        if states == {status}:
            return Text(status, style="yellow")
    return Text("passed, in part" if PASSED in states else "skipped", style="yellow")


def summary_line(cells: Sequence[Cell]) -> str:
    """How many cases passed, failed, are unsupported, were skipped; and were waived, if any."""
    totals = {status: sum(cell.counts[status] for cell in cells) for status in STATUSES}
    return ", ".join(f"{count} {status}" for status, count in totals.items() if count or status != WAIVED)


def failure_lines(result: CaseResult) -> list[str]:
    """Operation, case, coordinates, expected, got, err/bound, and the line that runs it again.  [PA-REPORT-3]"""
    return [*case_lines(result), f"  run it again: {result.reproduce}"]


def case_lines(result: CaseResult) -> list[str]:
    """One case in words: what it is, its verdict, and its worst element."""
    lines = [
        f"{result.status.upper()} {result.operation} {result.dtype} case {result.case_index} seed {result.seed}: "
        f"{result.label}"
    ]
    tiers = {"prob": result.ratio_prob, "sharp": result.ratio_sharp, "statistical": result.ratio_statistical}
    others = "".join(f", {ratio:.4g} {tier}" for tier, ratio in tiers.items() if ratio is not None)
    lines.append(f"  {result.message or f'err/bound is at most {result.ratio_det:.4g} det{others}'}")
    if hint := hint_of(result):
        lines.append(f"  {hint}")
    verdict = result.verdict
    if verdict is not None and (verdict.coordinates or verdict.expected != verdict.got):
        place = ", ".join(f"{axis} {position}" for axis, position in verdict.coordinates) or "the one result"
        lines.append(
            f"  {verdict.output} at {place}: expected {verdict.expected:.9g}, got {verdict.got:.9g}, "
            f"error {abs(verdict.got - verdict.expected):.3g}, bound {verdict.bound:.3g}"
        )
        if verdict.extent:
            lines.append(f"  {verdict.extent}")
    return lines


def hint_of(result: CaseResult) -> str:
    """What a failure of its kind mostly comes from, and what to do; "" where the message says all. Pure."""
    verdict = result.verdict
    if result.status != FAILED or verdict is None or not verdict.fault.startswith("err/bound"):
        return ""
    ratio = max(one for one in (verdict.ratio_det, verdict.ratio_prob, verdict.ratio_sharp) if one is not None)
    if not math.isfinite(ratio):
        return ""
    if ratio < LITTLE_BEYOND and "got / expected" not in verdict.extent:  # roundings have no factor in common
        return (
            "so little beyond 1 is mostly a rounding, a coarser sum or function that is not declared: "
            "take it out, or declare it (ferrum_ref.types.algorithm.Algorithm)"
        )
    return "no order of the declared arithmetic errs so much: other numbers are computed than asked for"


def invariance_table(found: Sequence[Invariance], title: str) -> Table:
    """One row for each operation and dtype: the same call twice, and each row alone beside the batch."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("operation", "dtype", "repeated", "rows alone", "where"):
        table.add_column(column, no_wrap=column != "where")
    for one in found:
        style = "" if one.passed else "bold red"
        table.add_row(
            one.operation, one.dtype, Text(one.repeated, style=style), Text(one.alone, style=style), one.detail
        )
    return table


def cells_as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as plain data: no times, so equal seeds give equal bytes.  [PA-REPORT-4]"""
    return [
        {
            "operation": cell.operation,
            "dtype": cell.dtype,
            "status": cell.status,
            "cases": dict(cell.counts),
            "worst_err_over_bound": tiers_as_json(cell),
            "worst_case": None if cell.worst is None else result_as_json(cell.worst),
            "failures": [result_as_json(result) for result in cell.failures],
            "reason": cell.reason,
        }
        for cell in cells
    ]


def result_as_json(result: CaseResult) -> dict[str, Any]:
    """One case as plain data."""
    verdict = result.verdict
    worst = None
    if verdict is not None:
        worst = {
            "output": verdict.output,
            "coordinates": dict(verdict.coordinates),
            "expected": number(verdict.expected),
            "got": number(verdict.got),
            "bound": number(verdict.bound),
            "extent": verdict.extent,
        }
    return {
        "case": result.case_index,
        "label": result.label,
        "seed": result.seed,
        "status": result.status,
        "err_over_bound": tiers_as_json(result),
        "worst": worst,
        "message": result.message,
        "reproduce": result.reproduce,
    }


def tiers_as_json(rated: Cell | CaseResult) -> dict[str, float | str | None]:
    """The largest err/bound of each tier; null where a tier does not apply."""
    return {
        "det": number(rated.ratio_det),
        "prob": number(rated.ratio_prob),
        "sharp": number(rated.ratio_sharp),
        "statistical": number(rated.ratio_statistical),
    }


def number(value: float | None) -> float | str | None:
    """A JSON number; what JSON cannot say (inf, nan) as text."""
    if value is None or math.isfinite(value):
        return value
    return str(value)
