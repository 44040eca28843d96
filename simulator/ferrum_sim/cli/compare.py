"""`ferrum-sim compare`: one workload under several values of one option."""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.cli.options import add_run_options, settings_of
from ferrum_sim.cli.run import add_output_options, say

VARIABLE = (
    "block-size",
    "compute-efficiency",
    "hardware",
    "host-overhead-ms",
    "max-num-batched-tokens",
    "max-num-seqs",
    "memory-efficiency",
    "model",
    "num-blocks",
    "policy",
    "prefix-caching",
    "rate-scale",
    "tensor-parallel",
)
SWITCHES = {"on": "--prefix-caching", "off": "--no-prefix-caching"}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand. Mutates `subparsers`."""
    parser = subparsers.add_parser(
        "compare",
        help="simulate one workload under several values of one option, and say which differences are real",
        description="The same requests (common random numbers) under each value; paired differences with intervals.",
    )
    parser.add_argument(
        "--vary",
        required=True,
        metavar="OPTION=V1,V2,...",
        help=f"what differs; OPTION is one of {', '.join(VARIABLE)}",
    )
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Simulate each value, compare with the first, print; 0."""
    from ferrum_sim.cli.progress import progress_bar
    from ferrum_sim.experiment import run_experiment
    from ferrum_sim.metrics.comparison import compare_runs
    from ferrum_sim.metrics.requests import request_columns
    from ferrum_sim.report.files import to_json

    option, values = _varied(args.vary)
    all_settings = [settings_of(_with_value(args, option, value)) for value in values]
    outcomes = []
    for value, settings in zip(values, all_settings, strict=True):
        with progress_bar(f"{option} {value}", args.quiet) as update:
            outcomes.append(run_experiment(settings, update))
    columns = [request_columns(outcome.record.records) for outcome in outcomes]
    differences = [compare_runs(columns[0], other, len(values) - 1) for other in columns[1:]]
    summaries = [outcome.summary for outcome in outcomes]
    if args.json:
        sys.stdout.write(to_json(_as_json(option, values, summaries, differences)))
    else:
        from ferrum_sim.report.tables import comparison_report, stdout_console

        stdout_console().print(comparison_report(option, values, summaries, differences))
    say(args, f"compared {len(values)} runs of {summaries[0]['workload']['description']}")
    return 0


def _varied(text: str) -> tuple[str, list[str]]:
    option, _, rest = text.partition("=")
    option = option.removeprefix("--")
    values = rest.split(",") if rest else []
    if option not in VARIABLE or len(values) < 2 or len(set(values)) < len(values):
        raise InvalidParameterError(
            f"compare: --vary is '{text}'; expected OPTION=V1,V2,... with two or more different values "
            f"and OPTION one of {', '.join(VARIABLE)}"
        )
    return option, values


def _with_value(args: argparse.Namespace, option: str, value: str) -> argparse.Namespace:
    """A copy of the options with one of them replaced, parsed as the command line would parse it."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_run_options(parser)
    if option == "prefix-caching":
        if value not in SWITCHES:
            raise InvalidParameterError(f"compare: prefix-caching is '{value}'; expected on or off")
        words = [SWITCHES[value]]
    else:
        words = [f"--{option}={value}"]
    try:
        return parser.parse_args(words, copy.copy(args))
    except argparse.ArgumentError as error:
        raise InvalidParameterError(f"compare: --vary: {error}") from error


def _as_json(option: str, values: list[str], summaries: list[dict[str, Any]], differences: list[Any]) -> dict[str, Any]:
    rows = [
        {
            "value": value,
            "metric": row.metric,
            "mean_difference": row.difference.mean if row.num_pairs else None,
            "half_width": row.difference.half_width,
            "num_pairs": row.num_pairs,
            "batches_dependent": row.difference.is_dependent,
            "verdict": row.verdict,
        }
        for value, rows_of_value in zip(values[1:], differences, strict=True)
        for row in rows_of_value
    ]
    return {"varied": option, "values": values, "baseline": values[0], "differences": rows, "runs": summaries}
