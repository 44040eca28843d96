"""Tables for people. Everything a table says is also in the JSON.  [SI-REPORT-1]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from ferrum_ref.program import table_console
from ferrum_sim.cost_model.hardware import HardwareSheet
from ferrum_sim.cost_model.model_sheet import ModelSheet
from ferrum_sim.metrics.comparison import PairedDifference

TABLE_WIDTH = 116
TITLES = {
    "queue_time_s": "wait before first step",
    "ttft_s": "time to first token (TTFT)",
    "tpot_s": "time per output token (TPOT)",
    "itl_s": "gap between tokens (ITL)",
    "e2e_s": "whole request (E2E)",
}


def stdout_console() -> Console:
    """A console of fixed width, so that equal runs print equal bytes wherever they print."""
    return table_console(width=TABLE_WIDTH, highlight=False, markup=False, emoji=False)


def seconds(value: float | None) -> str:
    """ "1.23 s", "45.6 ms" or "-": three significant digits. Pure."""
    if value is None:
        return "-"
    if abs(value) >= 1.0:
        return f"{value:,.0f} s" if abs(value) >= 1000.0 else f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100.0 * value:.1f} %"


def number(value: float | None) -> str:
    """Thousands separated, one decimal below 100. Pure."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100.0 or float(value).is_integer() else f"{value:,.2f}"


def run_report(summary: dict[str, Any]) -> RenderableType:
    """The summary of one run as two tables. Pure."""
    return Group(*_headline(summary), _latency_table(summary), _figures_table(summary), *_remarks(summary))


def _headline(summary: dict[str, Any]) -> list[str]:
    machine, limits = summary["machine"], summary["limits"]
    return [
        f"Workload: {summary['workload']['description']}",
        f"Engine:   {machine['model']} on {machine['tensor_parallel']} x {machine['hardware']}, "
        f"{limits['max_num_batched_tokens']:,} tokens a step, {limits['max_num_seqs']:,} requests at once, "
        f"{limits['policy']}, prefix cache {'on' if limits['prefix_caching'] else 'off'}",
    ]


def _latency_table(summary: dict[str, Any]) -> Table:
    table = Table(title="Latency of finished requests", title_justify="left", width=TABLE_WIDTH)
    table.add_column("what", no_wrap=True)
    for name in ("mean ± 95 % interval", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, title in TITLES.items():
        figures = summary["latency"][name]
        half_width = figures.get("mean_ci95_half_width")
        spread = "" if half_width is None else f" ± {seconds(half_width)}"
        table.add_row(
            title,
            seconds(figures["mean"]) + spread + ("*" if figures.get("batches_dependent") else ""),
            *(seconds(figures[key]) for key in ("p50", "p90", "p95", "p99", "max")),
        )
    return table


def _figures_table(summary: dict[str, Any]) -> Table:
    requests, throughput, goodput = summary["requests"], summary["throughput"], summary["goodput"]
    kv_cache, engine = summary["kv_cache"], summary["engine"]
    table = Table(title="The run as a whole", title_justify="left", width=TABLE_WIDTH, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    table.add_row(
        "requests",
        f"{requests['submitted']:,} submitted, {requests['finished']:,} finished, {requests['rejected']:,} rejected, "
        f"{requests['unfinished']:,} unfinished",
    )
    table.add_row(
        "throughput",
        f"{number(throughput['requests_per_s'])} requests/s, "
        f"{number(throughput['output_tokens_per_s'])} output tokens/s, "
        f"{number(throughput['total_tokens_per_s'])} tokens/s in and out, over {seconds(throughput['elapsed_s'])}",
    )
    table.add_row("goodput", _goodput_text(goodput))
    preemptions = f"{requests['preemptions']:,}, which hit {requests['preempted']:,} requests"
    table.add_row("preemptions", preemptions if requests["preemptions"] else "none")
    table.add_row(
        "KV cache",
        f"{percent(kv_cache['mean_use'])} used on average, {percent(kv_cache['max_use'])} at most, of "
        f"{kv_cache['num_blocks']:,} blocks of {kv_cache['block_size']} tokens",
    )
    table.add_row("prefix cache", f"{percent(kv_cache['prefix_hit_rate'])} of the prompt tokens were already cached")
    table.add_row(
        "engine",
        f"busy {percent(engine['busy_fraction'])} of the time, {engine['num_steps']:,} steps of "
        f"{seconds(engine['mean_step_s'])} with {number(engine['mean_sequences_per_step'])} sequences and "
        f"{number(engine['mean_new_tokens_per_step'])} new tokens each",
    )
    gap = summary["littles_law"]["relative_gap"]
    exactness = "exactly" if gap == 0.0 else f"to {gap:.0e}"
    table.add_row("Little's law", f"holds {exactness}: requests counted in the engine against their own time in it")
    return table


def _goodput_text(goodput: dict[str, Any]) -> str:
    names = (("slo_ttft_s", "TTFT"), ("slo_tpot_s", "TPOT"))
    objectives = [f"{label} <= {seconds(goodput[key])}" for key, label in names if goodput[key] is not None]
    condition = f"with {' and '.join(objectives)}" if objectives else "finished (no objective given)"
    share = percent(goodput["fraction_of_submitted"])
    return f"{share} of the submitted requests {condition}: {number(goodput['requests_per_s'])} requests/s"


def _remarks(summary: dict[str, Any]) -> list[str]:
    remarks = [str(note) for note in summary["workload"]["notes"]]
    if any(figures.get("batches_dependent") for figures in summary["latency"].values()):
        remarks.append(
            "* the load drifts or the run is short: neighbouring batch means agree, the interval is too narrow"
        )
    return remarks


def comparison_report(
    parameter: str,
    values: Sequence[str],
    summaries: Sequence[dict[str, Any]],
    differences: Sequence[list[PairedDifference]],
) -> RenderableType:
    """One column a value of `parameter`, then each value against the first, request by request. Pure."""
    headline = _headline(summaries[0])
    headline[1] = headline[1].replace("Engine:  ", "First:   ")
    headline.append(f"Varied:   {parameter}: {', '.join(values)}")
    tables = (_side_by_side(parameter, values, summaries), _differences_table(parameter, values, differences))
    is_dependent = any(row.difference.is_dependent for rows in differences for row in rows)
    remark = "probably: neighbouring batches of requests agree, so the interval is too narrow; simulate more requests"
    return Group(*headline, *tables, *([remark] if is_dependent else []))


def _side_by_side(parameter: str, values: Sequence[str], summaries: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"The same requests under each {parameter}", title_justify="left")
    table.add_column(parameter, no_wrap=True)
    for value in values:
        table.add_column(value, justify="right")
    for name, title in TITLES.items():
        table.add_row(f"{title}, mean", *(seconds(summary["latency"][name]["mean"]) for summary in summaries))
        table.add_row(f"{title}, p99", *(seconds(summary["latency"][name]["p99"]) for summary in summaries))
    table.add_row("requests finished", *(f"{summary['requests']['finished']:,}" for summary in summaries))
    table.add_row("requests rejected", *(f"{summary['requests']['rejected']:,}" for summary in summaries))
    table.add_row(
        "goodput, of submitted requests",
        *(percent(summary["goodput"]["fraction_of_submitted"]) for summary in summaries),
    )
    table.add_row("output tokens/s", *(number(summary["throughput"]["output_tokens_per_s"]) for summary in summaries))
    table.add_row("preemptions", *(f"{summary['requests']['preemptions']:,}" for summary in summaries))
    table.add_row("KV cache used, mean", *(percent(summary["kv_cache"]["mean_use"]) for summary in summaries))
    return table


def _differences_table(parameter: str, values: Sequence[str], differences: Sequence[list[PairedDifference]]) -> Table:
    table = Table(
        title=f"Is the difference to {parameter} {values[0]} real? Paired by request, jointly 95 % sure",
        title_justify="left",
    )
    for name in ("what", parameter, "difference of means", "verdict"):
        table.add_column(name, justify="left" if name in ("what", "verdict") else "right", no_wrap=True)
    for value, rows in zip(values[1:], differences, strict=True):
        for row in rows:
            half_width = row.difference.half_width
            spread = " (too few pairs)" if half_width is None else f" ± {seconds(half_width)}"
            mean = seconds(row.difference.mean if row.num_pairs else None)
            table.add_row(TITLES[row.metric], value, mean + spread, row.verdict)
    return table


def sheets_report(models: Sequence[ModelSheet], hardware: Sequence[HardwareSheet]) -> RenderableType:
    """The built-in sheets as two tables. Pure."""
    model_table = Table(title="Models (--model)", title_justify="left", width=TABLE_WIDTH)
    model_table.add_column("name", no_wrap=True)
    for name in ("weights", "layers", "hidden", "heads", "kv heads", "context", "KV bytes/token"):
        model_table.add_column(name, justify="right")
    for model in models:
        sizes = [model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads]
        sizes += [model.max_position_embeddings, model.kv_bytes_per_token]
        model_table.add_row(model.name, f"{model.num_weights / 1e9:.2f} G", *(f"{size:,}" for size in sizes))
    table = Table(title="Accelerators (--hardware)", title_justify="left", width=TABLE_WIDTH)
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    for name in ("bf16 TFLOP/s", "GB/s", "memory GB", "efficiency: compute", "memory", "source"):
        table.add_column(name, justify="right")
    for sheet in hardware:
        table.add_row(
            sheet.name,
            sheet.title,
            f"{sheet.peak_flops_per_s / 1e12:.1f}",
            f"{sheet.memory_bytes_per_s / 1e9:,.0f}",
            f"{sheet.memory_bytes / 1e9:.1f}",
            f"{sheet.compute_efficiency:.2f}",
            f"{sheet.memory_efficiency:.2f}",
            sheet.efficiency_source,
        )
    return Group(model_table, table)
