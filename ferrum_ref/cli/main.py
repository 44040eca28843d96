"""Entry point of `ferrum-ref`: parses and dispatches; `ferrum_ref.program` turns errors into one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ferrum_ref import __version__
from ferrum_ref.cli import (
    backends,
    embed,
    generate,
    inspect,
    parallel,
    parity,
    pull,
    speak,
    transcribe,
    vectors,
    verify,
)
from ferrum_ref.program import OneLineParser, run_program

SUBCOMMANDS = (pull, inspect, generate, parallel, embed, transcribe, speak, parity, vectors, verify, backends)


def build_parser() -> OneLineParser:
    """The whole command line; pure."""
    parser = OneLineParser(
        prog="ferrum-ref",
        description="ferrum's inference contracts, exactly: run real models in numpy, judge fast backends against it.",
    )
    parser.add_argument("--version", action="version", version=f"ferrum-ref {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.  [EN-CLI-1..3]"""
    return run_program("ferrum-ref", build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
