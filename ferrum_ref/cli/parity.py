"""`ferrum-ref parity`: judge a backend against the float64 oracle with derived error bounds.  [PA-CLI-1..5]"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.program import table_console

if TYPE_CHECKING:
    from rich.console import Console

    from ferrum_ref.parity.cells import Cell
    from ferrum_ref.parity.model import ModelVerdict
    from ferrum_ref.parity.runner import CaseResult, Selection
    from ferrum_ref.parity.subject import BackendSubject

DEFAULT_MODEL = "smollm2-135m"
NO_MODEL = "none"
QUESTION = "What is the capital of France?"
NUM_GENERATED = 16
MAX_FAILURES_SHOWN = 8
TABLE_WIDTH = 118


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "parity",
        help="judge a backend's numerics against a float64 oracle",
        description="Run every operation of a backend on inputs that show where kernels go wrong, and compare each "
        "element with the float64 result. The largest permitted error is derived from the arithmetic that the backend "
        "declares; err/bound above 1 is a failure. Exit code 0: all passed, 1: something failed, 2: wrong usage.",
    )
    parser.add_argument("--backend", required=True, metavar="NAME", help="a backend's name, or package.module:factory")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda:0, ...")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="this operation; may be repeated")
    parser.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="fp32, fp16, bf16; repeatable")
    parser.add_argument("--case", type=int, metavar="N", help="only case N; needs one --op")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first seed of the random inputs (default 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="number of seeds (default 1)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after that; skip the rest")
    parser.add_argument("--small", action="store_true", help="leave out the cases that cost more than milliseconds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"judge this model's layers and logits only; by default {DEFAULT_MODEL} comes after the operations when "
        f"it is on this machine; '{NO_MODEL}' leaves it out",
    )
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Judge; tables or JSON on stdout, progress and remarks on stderr."""
    from rich.console import Console

    from ferrum_ref.parity.cells import gather, has_failed
    from ferrum_ref.parity.runner import PASSED
    from ferrum_ref.parity.subject import BackendSubject
    from ferrum_ref.plugins import load_backend

    selection = _selection(args)
    subject = BackendSubject(load_backend(args.backend, args.device), args.backend, args.device)
    notes = Console(stderr=True)
    only_model = args.model not in (None, NO_MODEL)
    results = [] if only_model else _judge_operations(subject, selection, args.budget, notes)
    cells = gather(results)
    if not args.json:
        _print_operations(args, results, cells)
    model, remark = _judge_model(args, subject, selection, notes)
    if args.json:
        print(_as_json(args, cells, model, remark))
    elif model is not None:
        _print_model(args, model)
    if remark:
        print(remark, file=sys.stderr)
    judged = model is not None or any(cell.counts[PASSED] for cell in cells)
    return 1 if has_failed(cells) or not judged or (model is not None and not model.passed) else 0


def _selection(args: argparse.Namespace) -> Selection:
    """Raises InvalidParameterError for options that contradict each other or name nothing."""
    from ferrum_ref.errors import InvalidParameterError
    from ferrum_ref.parity.runner import Selection

    if args.case is not None and len(args.op) != 1:
        raise InvalidParameterError("parity: --case counts the cases of one operation; give exactly one --op")
    if args.budget is not None and not args.budget > 0:
        raise InvalidParameterError(f"parity: --budget is {args.budget:g}, expected seconds above 0")
    selection = Selection(tuple(args.op), tuple(args.dtype), args.case, args.seed, args.seeds, args.small)
    selection.items()  # refuses unknown names before anything runs
    return selection


def _judge_operations(
    subject: BackendSubject, selection: Selection, budget_s: float | None, notes: Console
) -> list[CaseResult]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ferrum_ref.parity.runner import run as run_cases

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    results = []
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("operations", total=len(selection.items()))
        for result in run_cases(subject, selection, budget_s):
            results.append(result)
            progress.update(task, advance=1, description=f"{result.operation} {result.dtype}")
    return results


def _judge_model(
    args: argparse.Namespace, subject: BackendSubject, selection: Selection, notes: Console
) -> tuple[ModelVerdict | None, str]:
    """The verdict, or None and why there is none."""
    from ferrum_ref.errors import NotFoundError
    from ferrum_ref.models.source import resolve_model

    if args.model == NO_MODEL:
        return None, ""
    if args.model is None and (selection.operations or selection.dtypes or selection.only_small):
        return None, ""
    try:
        path = resolve_model(args.model or DEFAULT_MODEL, cache_dir(args))
    except NotFoundError as error:
        if args.model is not None:
            raise
        return None, f"whole model left out: {error.message}"
    from rich.progress import Progress

    from ferrum_ref.cli.parity_model import judge_model_at

    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("model in float64")
        verdict = judge_model_at(
            path,
            subject.backend,
            QUESTION,
            NUM_GENERATED,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    return verdict, ""


def _print_operations(args: argparse.Namespace, results: list[CaseResult], cells: list[Cell]) -> None:
    from ferrum_ref.parity.report import case_lines, failure_lines, parity_table, summary_line

    out = _console()
    if cells:
        out.print(parity_table(cells, f"{args.backend} on {args.device}: largest err/bound, each bound derived"))
        out.print("1 is the most that the declared arithmetic can err. det: every rounding at its worst; sharp: on")
        out.print("independent random data, exceeded by an honest run with probability 1e-9; -: does not apply.")
        out.print(summary_line(cells))
    failures = [failure for cell in cells for failure in cell.failures]
    for failure in failures[:MAX_FAILURES_SHOWN]:
        out.print("\n".join(failure_lines(failure)), markup=False)
    if len(failures) > MAX_FAILURES_SHOWN:
        out.print(f"... and {len(failures) - MAX_FAILURES_SHOWN} more; --json lists them all")
    if args.case is not None and not failures:
        for result in results:
            out.print("\n".join(case_lines(result)), markup=False)


def _print_model(args: argparse.Namespace, verdict: ModelVerdict) -> None:
    from ferrum_ref.parity.model_report import model_lines, model_table

    out = _console()
    out.print(model_table(verdict, f"{args.model or DEFAULT_MODEL} on {args.backend}, against a float64 run"))
    out.print("\n".join(model_lines(verdict)), markup=False)


def _console() -> Console:
    """Standard output: as wide as the terminal, or as wide as the table in a file or pipe."""
    terminal = sys.stdout.isatty()
    return table_console(width=None if terminal else TABLE_WIDTH, highlight=False, soft_wrap=not terminal)


def _as_json(args: argparse.Namespace, cells: list[Cell], model: ModelVerdict | None, remark: str) -> str:
    from ferrum_ref.parity.model_report import model_as_json
    from ferrum_ref.parity.report import cells_as_json

    document = {
        "backend": args.backend,
        "device": args.device,
        "first_seed": args.seed,
        "num_seeds": args.seeds,
        "cells": cells_as_json(cells),
        "model": {"name": args.model or DEFAULT_MODEL, **model_as_json(model)} if model is not None else None,
        "remark": remark,
    }
    return json.dumps(document, indent=2, allow_nan=False)
