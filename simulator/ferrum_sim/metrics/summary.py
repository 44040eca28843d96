"""The figures of a run, as plain data ready for JSON.  [SI-METRIC-3..7]"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.metrics.intervals import batch_means
from ferrum_sim.metrics.records import FINISHED, REJECTED, UNFINISHED, Column, RunRecord, StepLog
from ferrum_sim.metrics.requests import request_columns

PERCENTILES = (50, 90, 95, 99)
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SummaryOptions:
    """Service-level objectives in seconds (None: none) and the warm-up to leave out.  [SI-METRIC-5, SI-STAT-3]"""

    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    warmup_s: float = 0.0

    def __post_init__(self) -> None:
        objectives = (self.slo_ttft_s, self.slo_tpot_s)
        if any(value is not None and not value > 0.0 for value in objectives) or not 0.0 <= self.warmup_s < math.inf:
            raise InvalidParameterError(
                f"SummaryOptions: slo_ttft_s {self.slo_ttft_s}, slo_tpot_s {self.slo_tpot_s}, "
                f"warmup_s {self.warmup_s}; expected objectives > 0 and a finite warm-up >= 0"
            )


def summarise(run: RunRecord, options: SummaryOptions) -> Figures:
    """All figures of a run. Pure.

    Requests that arrive before `warmup_s`, and steps that start before it, count in no figure but `warm_up`.
    Latencies are those of finished requests; rejected and unfinished ones count in goodput's denominator.
    """
    columns = request_columns(run.records)
    kept = columns["arrival_s"] >= options.warmup_s
    columns = {name: values[kept] for name, values in columns.items()}
    steps = run.steps.arrays()
    steps_kept = steps["start_s"] >= options.warmup_s
    steps = {name: values[steps_kept] for name, values in steps.items()}
    finished = {name: values[columns["status"] == FINISHED] for name, values in columns.items()}
    start_s = _least(columns["arrival_s"], options.warmup_s) if options.warmup_s == 0.0 else options.warmup_s
    end_s = float(steps["end_s"][-1]) if len(steps["end_s"]) else start_s
    elapsed_s = end_s - start_s
    return {
        "requests": _counts(columns),
        "warm_up": {"seconds": options.warmup_s, "requests_left_out": int(np.sum(~kept))},
        "latency": _latencies(finished, run.steps, options.warmup_s),
        "throughput": _throughput(finished, elapsed_s),
        "goodput": _goodput(columns, elapsed_s, options),
        "kv_cache": _kv_cache(run, finished, steps, elapsed_s),
        "engine": _engine(steps, elapsed_s),
        "littles_law": littles_law(run),
    }


def _least(values: NDArray[np.float64], default: float) -> float:
    return float(values.min()) if len(values) else default


def _counts(columns: dict[str, NDArray[Any]]) -> Figures:
    status = columns["status"]
    return {
        "submitted": len(status),
        "finished": int(np.sum(status == FINISHED)),
        "rejected": int(np.sum(status == REJECTED)),
        "unfinished": int(np.sum(status == UNFINISHED)),
        "preempted": int(np.sum(columns["num_preemptions"] > 0)),
        "preemptions": int(np.sum(columns["num_preemptions"])),
    }


def _latencies(finished: dict[str, NDArray[Any]], steps: StepLog, warmup_s: float) -> Figures:
    """Mean with interval, percentiles (linear interpolation between order statistics) and maximum, in seconds."""
    latencies = {}
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_time_s"):
        values = finished[name][~np.isnan(finished[name])]
        interval = batch_means(values)
        figures: Figures = {"count": len(values), "mean": _finite(interval.mean)}
        figures["mean_ci95_half_width"] = interval.half_width
        figures["batches_dependent"] = interval.is_dependent
        for percent in PERCENTILES:
            figures[f"p{percent}"] = float(np.percentile(values, percent)) if len(values) else None
        figures["max"] = float(values.max()) if len(values) else None
        latencies[name] = figures
    latencies["itl_s"] = _itl(steps, warmup_s)
    return latencies


def _itl(steps: StepLog, warmup_s: float) -> Figures:
    """Gaps between consecutive tokens of a request, over all requests, that end at `warmup_s` or later."""
    values, counts = steps.itl_distribution(warmup_s)
    total = int(counts.sum())
    figures: Figures = {"count": total, "mean": math.fsum(values * counts) / total if total else None}
    cumulative = np.cumsum(counts)
    for percent in PERCENTILES:
        rank = -(-percent * total // 100)
        figures[f"p{percent}"] = float(values[np.searchsorted(cumulative, rank)]) if total else None
    figures["max"] = float(values[-1]) if total else None
    return figures


def _throughput(finished: dict[str, NDArray[Any]], elapsed_s: float) -> Figures:
    prompt_tokens, output_tokens = int(finished["num_prompt_tokens"].sum()), int(finished["num_generated_tokens"].sum())
    return {
        "elapsed_s": elapsed_s,
        "requests_per_s": _ratio(len(finished["index"]), elapsed_s),
        "prompt_tokens_per_s": _ratio(prompt_tokens, elapsed_s),
        "output_tokens_per_s": _ratio(output_tokens, elapsed_s),
        "total_tokens_per_s": _ratio(prompt_tokens + output_tokens, elapsed_s),
    }


def _goodput(columns: dict[str, NDArray[Any]], elapsed_s: float, options: SummaryOptions) -> Figures:
    """Requests that finished and met every objective, over those submitted. One token: no TPOT to miss."""
    met = columns["status"] == FINISHED
    if options.slo_ttft_s is not None:
        met = met & (columns["ttft_s"] <= options.slo_ttft_s)
    if options.slo_tpot_s is not None:
        met = met & ((columns["tpot_s"] <= options.slo_tpot_s) | (columns["num_generated_tokens"] == 1))
    num_met = int(np.sum(met))
    return {
        "slo_ttft_s": options.slo_ttft_s,
        "slo_tpot_s": options.slo_tpot_s,
        "requests_met": num_met,
        "fraction_of_submitted": _ratio(num_met, len(met)),
        "requests_per_s": _ratio(num_met, elapsed_s),
    }


def _kv_cache(run: RunRecord, finished: dict[str, NDArray[Any]], steps: dict[str, Column], elapsed_s: float) -> Figures:
    """Blocks held by requests, weighted with time (idle time counts as 0), as fractions of the pool."""
    durations_s = steps["end_s"] - steps["start_s"]
    block_seconds = math.fsum(steps["used_blocks"] * durations_s)
    most_used = int(steps["used_blocks"].max()) if len(durations_s) else 0
    prompt_tokens = int(finished["num_prompt_tokens"].sum())
    return {
        "num_blocks": run.num_blocks,
        "block_size": run.block_size,
        "mean_use": _ratio(block_seconds, elapsed_s * run.num_blocks),
        "max_use": most_used / run.num_blocks,
        "prefix_hit_rate": _ratio(int(finished["num_cached_prompt_tokens"].sum()), prompt_tokens),
    }


def _engine(steps: dict[str, Column], elapsed_s: float) -> Figures:
    durations_s = steps["end_s"] - steps["start_s"]
    busy_s = math.fsum(durations_s)
    return {
        "num_steps": len(durations_s),
        "busy_fraction": _ratio(busy_s, elapsed_s),
        "mean_step_s": _ratio(busy_s, len(durations_s)),
        "mean_sequences_per_step": _ratio(int(steps["num_sequences"].sum()), len(durations_s)),
        "mean_new_tokens_per_step": _ratio(int(steps["num_new_tokens"].sum()), len(durations_s)),
        "computed_tokens": int(steps["num_new_tokens"].sum()),
    }


def littles_law(run: RunRecord) -> Figures:
    """Sum over steps of (requests in the engine) * duration against the sum of the requests' times in it.  [SI-LAW-3]

    The left side is counted by the engine step by step, the right side by the requests' own records: on a finished run
    they are one number (L = lambda W on the sample path), here up to rounding. Pure.
    Source: Little 1961; Stidham 1974.
    """
    steps = run.steps.arrays()
    in_engine = (steps["num_running"] + steps["num_waiting"]).astype(np.float64)
    engine_s = math.fsum(in_engine * (steps["end_s"] - steps["start_s"]))
    requests_s = math.fsum(record.finish_s - record.noticed_s for record in run.records if record.status == FINISHED)
    return {
        "request_seconds_by_steps": engine_s,
        "request_seconds_by_requests": requests_s,
        "relative_gap": abs(engine_s - requests_s) / requests_s if requests_s > 0.0 else 0.0,
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
