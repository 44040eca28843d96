"""`ferrum-sim list`: the models and accelerators with built-in sheets."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand. Mutates `subparsers`."""
    parser = subparsers.add_parser("list", help="show the models and accelerators with built-in sheets")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the sheets; 0."""
    from dataclasses import asdict

    from ferrum_sim.cost_model.hardware import HARDWARE
    from ferrum_sim.cost_model.model_sheet import MODELS
    from ferrum_sim.report.files import to_json

    if args.json:
        sheets = {"models": [asdict(sheet) | {"num_weights": sheet.num_weights} for sheet in MODELS.values()]}
        sys.stdout.write(to_json(sheets | {"hardware": [asdict(sheet) for sheet in HARDWARE.values()]}))
        return 0
    from ferrum_sim.report.tables import sheets_report, stdout_console

    stdout_console().print(sheets_report(list(MODELS.values()), list(HARDWARE.values())))
    return 0
