"""What the project's programs have in common: one-line complaints, exit codes, a console that survives `| head`.

Exit codes: 0 good, 1 a check found a failure, 2 wrong usage or bad input, 130 interrupted.  [EN-CLI-1..3, specs/cli.md]
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from ferrum_ref.errors import FerrumError, FerrumIOError, InternalError, ResourceExhaustedError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FOUND_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line: what is wrong and where to read more.  [EN-CLI-2]"""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {_one_line(message)} (see '{self.prog} --help')\n")


def run_program(program: str, args: argparse.Namespace) -> int:
    """Call `args.func(args)`; a named error becomes one line on standard error.  Returns the exit code.  [EN-CLI-1..3]

    A broken invariant of this project (InternalError) is a failure found, 1; every other named error is bad input, 2.
    """
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
        failure = ResourceExhaustedError(f"{args.command}: not enough memory; try a smaller model or fewer requests")
    except OSError as error:
        failure = FerrumIOError(str(error))
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return EXIT_INTERRUPTED
    sys.stderr.write(f"{program}: error: {_one_line(str(failure))}\n")
    return EXIT_FOUND_FAILURE if isinstance(failure, InternalError) else EXIT_BAD_INPUT


def table_console(**options: Any) -> Console:
    """A rich console on standard output that leaves a broken pipe to `run_program` (rich itself would exit with 1)."""
    from rich.console import Console

    class TableConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return TableConsole(**options)


def _one_line(text: str) -> str:
    return " ".join(text.split())
