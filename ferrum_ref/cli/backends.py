"""`ferrum-ref backends`: which backends are installed, on which devices they run, and why one is unavailable."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_ref.plugins import BackendInfo

HEADER = ("backend", "available", "version", "devices")


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "backends",
        help="list the installed backends",
        description="List every installed compute backend: its version and devices, or why it cannot be used here.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the list; 0 also when a backend is unavailable: that is an answer, not a failure.  [BK-PLUGIN-8]"""
    from ferrum_ref.plugins import available_backends

    infos = available_backends().values()
    print(json.dumps([asdict(info) for info in infos], indent=2) if args.json else "\n".join(table(infos)))
    return 0


def table(infos: Iterable[BackendInfo]) -> list[str]:
    """The lines of the table; a reason stands on its own line under its backend. Pure."""
    infos = list(infos)
    if not infos:
        return ["no backend is registered; reinstall ferrum-ref"]
    rows = [HEADER]
    rows += [(i.name, "yes" if i.available else "no", i.version or "-", ", ".join(i.devices) or "-") for i in infos]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for position, info in reversed(list(enumerate(infos, start=2))):
        if not info.available:
            lines.insert(position, f"    {' '.join(info.reason.split())}")
    return lines
