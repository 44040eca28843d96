"""Entry point of `ferrum-ref`: parses, dispatches, and turns every named error into one line and exit code 2.

Exit codes: 0 good, 1 a check found a failure, 2 wrong usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ferrum_ref import __version__
from ferrum_ref.cli import backends, generate, inspect, parity, pull
from ferrum_ref.errors import FerrumError, FerrumIOError, ResourceExhaustedError

SUBCOMMANDS = (pull, inspect, generate, parity, backends)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line: what is wrong and where to read more."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def build_parser() -> argparse.ArgumentParser:
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


def one_line(error: BaseException) -> str:
    """The error's text folded to a single line."""
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.  [EN-CLI-1..3]"""
    args = build_parser().parse_args(argv)
    try:
        code = int(args.func(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output went away: not our failure, and nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FerrumError as error:
        failure: FerrumError = error
    except MemoryError:
        failure = ResourceExhaustedError(f"{args.command}: not enough memory for this model; try a smaller one")
    except OSError as error:
        failure = FerrumIOError(str(error))
    except KeyboardInterrupt:
        print("ferrum-ref: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"ferrum-ref: error: {one_line(failure)}", file=sys.stderr)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
