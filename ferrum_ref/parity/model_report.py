"""A model's verdict as text and as JSON.  Clause: PA-REPORT-5."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from ferrum_ref.parity.model import FLOOR_FACTOR, ModelVerdict, PointError
from ferrum_ref.parity.report import number


def model_table(verdict: ModelVerdict, title: str) -> Table:
    """The layers that say most (first, worst against the floor, last) and the logits."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("hidden state after", "relative error", "float32 floor", "error/floor"):
        table.add_column(column, justify="left" if column.startswith("hidden") else "right", no_wrap=True)
    layers = verdict.layers
    worst = max(layers, key=_times_floor)
    for point in dict.fromkeys((layers[0], worst, layers[-1])):
        mark = " (worst)" if point is worst else ""
        style = "" if point.inside else "bold red"
        table.add_row(
            point.name.removesuffix(".hidden").replace("s.", " ") + mark,
            f"{point.error:.2e}",
            f"{point.floor:.2e}",
            Text(f"{_times_floor(point):.2f}", style=style),
        )
    return table


def model_lines(verdict: ModelVerdict) -> list[str]:
    """What the table does not say: logits, distributions, tokens, and the faults."""
    lines = [
        f"logits: largest error {verdict.logits_error:.2e}, float32 alone {verdict.logits_floor:.2e}; "
        f"KL from float64 at most {verdict.kl_max:.1e} nats; best token agrees in {verdict.top1_agreement:.1%} of rows",
        f"greedy text: {verdict.greedy_prefix} of {verdict.num_generated} tokens are float64's own choice",
    ]
    if verdict.margin is not None:
        lines.append(f"at the first difference float64 decides by {verdict.margin:.3g}")
    if verdict.num_compared_rows < verdict.num_rows:
        lines.append(
            f"compared: {verdict.num_compared_rows} of {verdict.num_rows} rows; the next one goes to other experts in "
            "float32 than in float64"
        )
    return lines + [f"FAILED: {fault}" for fault in verdict.faults]


def _times_floor(point: PointError) -> float:
    if point.floor == 0.0:
        return 0.0 if point.error == 0.0 else float("inf")
    return point.error / point.floor


def model_as_json(verdict: ModelVerdict) -> dict[str, Any]:
    """The verdict as plain data."""
    return {
        "status": "passed" if verdict.passed else "failed",
        "faults": verdict.faults,
        "prompt_tokens": verdict.num_prompt_tokens,
        "generated_tokens": verdict.num_generated,
        "token_ids": list(verdict.text_token_ids),
        "floor_factor": FLOOR_FACTOR,
        "rows": {"compared": verdict.num_compared_rows, "all": verdict.num_rows},
        "layers": [
            {"name": point.name, "error": number(point.error), "floor": number(point.floor)} for point in verdict.layers
        ],
        "first_outside": verdict.first_outside,
        "logits": {"max_error": number(verdict.logits_error), "floor": number(verdict.logits_floor)},
        "kl_nats": {"mean": number(verdict.kl_mean), "max": number(verdict.kl_max)},
        "top1_agreement": verdict.top1_agreement,
        "greedy_prefix": verdict.greedy_prefix,
        "margin_at_first_difference": number(verdict.margin),
    }
