"""The kill matrix as a table and as plain data.  Clause: PA-MUTANT-5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ferrum_ref.parity.mutants.matrix import OURS, SUITES, WITH_PROBES, MatrixRow, killed_share

NOT_JUDGED = "-"


def matrix_table(rows: Sequence[MatrixRow], title: str) -> Table:
    """One row for each mutant: of its (dtype, seed) pairs, how many each suite rejects."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("group", "operation", "mutant"):
        table.add_column(column, no_wrap=True)
    table.add_column("pairs", justify="right", no_wrap=True)
    for suite in SUITES:
        table.add_column(WITH_PROBES if suite.endswith(WITH_PROBES) else suite, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.group, row.operation, row.name, str(row.cells), *(_killed(row, suite) for suite in SUITES))
    return table


def _killed(row: MatrixRow, suite: str) -> Text:
    if row.operation == NOT_JUDGED and suite != OURS:
        return Text(NOT_JUDGED, style="dim")
    count = row.kills.get(suite, 0)
    return Text(str(count), style="" if count == row.cells else "red" if suite == OURS else "yellow")


def summary_table(rows: Sequence[MatrixRow]) -> Table:
    """For each group, how many mutants each suite rejects in every pair."""
    table = Table(title="mutants killed in every dtype on every seed", title_justify="left", pad_edge=False)
    table.add_column("group", no_wrap=True)
    table.add_column("mutants", justify="right")
    for suite in SUITES:
        table.add_column(WITH_PROBES if suite.endswith(WITH_PROBES) else suite, justify="right", no_wrap=True)
    groups = list(dict.fromkeys(row.group for row in rows))
    for group in (*groups, "all kernels", "all"):
        mine = [row for row in rows if group in (row.group, "all") or (group == "all kernels" and row.operation != "-")]
        judged = [row for row in mine if row.operation != NOT_JUDGED]
        figures = [str(_all_killed(mine if suite == OURS else judged, suite)) for suite in SUITES]
        shown = [figure if suite == OURS or judged else NOT_JUDGED for figure, suite in zip(figures, SUITES)]
        table.add_row(group, str(len(mine)), *shown)
    return table


def _all_killed(rows: Sequence[MatrixRow], suite: str) -> int:
    return sum(row.kills.get(suite, 0) == row.cells for row in rows)


def matrix_lines(rows: Sequence[MatrixRow], seeds: Sequence[int]) -> list[str]:
    """The score in words, and what survived."""
    worst = min((killed_share(rows, seed) for seed in seeds), default=0.0)
    lines = [
        f"{len(rows)} mutants, {len(seeds)} seeds: {killed_share(rows):.1%} are killed on every seed, "
        f"at least {worst:.1%} on each"
    ]
    for row in rows:
        if row.survived:
            where = ", ".join(f"{dtype} seed {seed}" for dtype, seed in row.survived[:4])
            lines.append(f"survives: {row.operation} {row.name} ({where})")
    return lines


def rows_as_json(rows: Sequence[MatrixRow]) -> list[dict[str, Any]]:
    """The matrix as plain data."""
    return [
        {
            "group": row.group,
            "operation": row.operation,
            "mutant": row.name,
            "pairs": row.cells,
            "killed": {suite: row.kills.get(suite, 0) for suite in SUITES if suite == OURS or row.operation != "-"},
            "survived": [{"dtype": dtype, "seed": seed} for dtype, seed in row.survived],
        }
        for row in rows
    ]
