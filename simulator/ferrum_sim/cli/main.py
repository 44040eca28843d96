"""Entry point of `ferrum-sim`: parses and dispatches; `ferrum_ref.program` words the errors.  [SI-CLI-1..3]"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ferrum_ref import __version__
from ferrum_ref.program import OneLineParser, run_program
from ferrum_sim.cli import compare, list, run

SUBCOMMANDS = (run, compare, list)


def build_parser() -> OneLineParser:
    """The whole command line; pure."""
    parser = OneLineParser(
        prog="ferrum-sim",
        description="Simulate an inference server: the engine's own scheduler and KV cache under a virtual clock.",
    )
    parser.add_argument("--version", action="version", version=f"ferrum-sim {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.  [SI-CLI-1..3]"""
    return run_program("ferrum-sim", build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
