"""`ferrum-sim run`: one simulation."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ferrum_sim.cli.options import add_run_options, settings_of


def add_parser(subparsers: Any) -> None:
    """Add the subcommand. Mutates `subparsers`."""
    parser = subparsers.add_parser(
        "run",
        help="simulate one workload on one machine",
        description="Simulate an inference server: the engine's own scheduler and KV cache under a virtual clock.",
    )
    add_run_options(parser)
    add_output_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write summary.json, requests.parquet and timeline.parquet there"
    )
    parser.set_defaults(func=run)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --json and --quiet. Mutates the parser."""
    parser.add_argument("--json", action="store_true", help="JSON instead of tables on stdout")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def run(args: argparse.Namespace) -> int:
    """Simulate, print, write; 0."""
    from ferrum_sim.cli.progress import progress_bar
    from ferrum_sim.experiment import run_experiment
    from ferrum_sim.report.files import to_json, write_results

    started_s = time.perf_counter()
    with progress_bar("simulating", args.quiet) as update:
        outcome = run_experiment(settings_of(args), update)
    if args.out is not None:
        paths = write_results(args.out, outcome.summary, outcome.record)
        say(args, "wrote " + ", ".join(str(path) for path in paths))
    if args.json:
        sys.stdout.write(to_json(outcome.summary))
    else:
        from ferrum_sim.report.tables import run_report, stdout_console

        stdout_console().print(run_report(outcome.summary))
    simulated_s = outcome.summary["throughput"]["elapsed_s"]
    say(args, f"simulated {simulated_s:,.0f} s in {time.perf_counter() - started_s:.1f} s")
    return 0


def say(args: argparse.Namespace, text: str) -> None:
    """One line on stderr unless --quiet."""
    if not args.quiet:
        print(text, file=sys.stderr)
