"""Entry point of `ferrum-sim`: parses, dispatches, and turns every named error into one line.

Exit codes: 0 good, 1 an invariant of the engine broke, 2 wrong usage or bad input, 130 interrupted.  [SI-CLI-1..3]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ferrum_ref import __version__
from ferrum_ref.errors import FerrumError, FerrumIOError, InternalError, ResourceExhaustedError
from ferrum_sim.cli import compare, list, run

SUBCOMMANDS = (run, compare, list)
EXIT_FOUND_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line: what is wrong and where to read more."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())} (see '{self.prog} --help')\n")


def build_parser() -> argparse.ArgumentParser:
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
        failure = ResourceExhaustedError(f"{args.command}: not enough memory; simulate fewer requests (--limit)")
    except OSError as error:
        failure = FerrumIOError(str(error))
    except KeyboardInterrupt:
        print("ferrum-sim: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"ferrum-sim: error: {' '.join(str(failure).split())}", file=sys.stderr)
    return EXIT_FOUND_FAILURE if isinstance(failure, InternalError) else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
