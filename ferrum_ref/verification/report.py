"""A verification as a table, as lines and as plain data.  Clause: VE-REPORT-1 (specs/verify.md)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ferrum_ref.verification.comparison import FLOOR_FACTOR, PointComparison, Verification

if TYPE_CHECKING:
    from rich.table import Table


def as_table(verification: Verification, title: str, every_layer: bool = False) -> Table:
    """The points that say most (first, worst, first outside, last, logits), or all of them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("hidden state after", "relative error", "transformers float32", "ratio"):
        table.add_column(column, justify="left" if column.startswith("hidden") else "right", no_wrap=True)
    points = verification.points
    worst = max(points, key=lambda point: point.times_floor)
    outside = next((point for point in points if not point.inside), None)
    shown = points if every_layer else [points[0], worst, *([outside] if outside else []), points[-2], points[-1]]
    wanted = {point.name for point in shown}
    for point in points:
        if point.name in wanted:
            marks = " (worst)" if point is worst else ""
            marks += " (first outside)" if point is outside else ""
            style = "" if point.inside else "bold red"
            table.add_row(
                _spoken(point) + marks,
                f"{point.error:.2e}",
                f"{point.floor:.2e}",
                Text(f"{point.times_floor:.2f}", style=style),
            )
    return table


def as_lines(verification: Verification) -> list[str]:
    """What the table does not say: logits, tokens, and the faults."""
    total = len(verification.greedy_expected)
    lines = [
        f"logits: largest error {verification.logits_error:.2e}, "
        f"transformers' own float32 {verification.logits_floor:.2e}",
        f"greedy text: {verification.greedy_prefix} of {total} tokens are transformers' float64 choice",
    ]
    if verification.margin is not None:
        lines.append(f"at the first difference float64 decides by {verification.margin:.3g}")
    return lines + [f"FAILED: {fault}" for fault in verification.faults]


def as_json(verification: Verification) -> dict[str, Any]:
    """The verification as plain data; what is not finite is null."""
    return {
        "status": "passed" if verification.passed else "failed",
        "faults": list(verification.faults),
        "floor_factor": FLOOR_FACTOR,
        "points": [
            {
                "name": point.name,
                "error": _finite(point.error),
                "floor": _finite(point.floor),
                "ratio": _finite(point.times_floor),
                "worst_token": point.row,
            }
            for point in verification.points
        ],
        "first_outside": verification.first_outside,
        "logits": {"max_error": _finite(verification.logits_error), "floor": _finite(verification.logits_floor)},
        "greedy_prefix": verification.greedy_prefix,
        "greedy_tokens": list(verification.greedy_expected),
        "margin_at_first_difference": verification.margin,
    }


def _spoken(point: PointComparison) -> str:
    return point.name.removesuffix(".hidden").replace("layers.", "layer ")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
