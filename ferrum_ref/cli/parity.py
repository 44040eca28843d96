"""`ferrum-ref parity`: judge a backend against the float64 oracle with derived error bounds.  [PA-CLI-1..5]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.program import table_console

if TYPE_CHECKING:
    from rich.console import Console

    from ferrum_ref.parity.cells import Cell
    from ferrum_ref.parity.model import ModelVerdict
    from ferrum_ref.parity.runner import CaseResult, Selection
    from ferrum_ref.parity.subject import Subject

DEFAULT_MODEL = "smollm2-135m"
NO_MODEL = "none"
QUESTION = "What is the capital of France?"
NUM_GENERATED = 16
MAX_FAILURES_SHOWN = 8
TABLE_WIDTH = 166
MATRIX_WIDTH = 176


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "parity",
        help="judge a backend's numerics against a float64 oracle",
        description="Run every operation of a backend on inputs that show where kernels go wrong, and compare each "
        "element with the float64 result. The largest permitted error is derived from the arithmetic that the backend "
        "declares; err/bound above 1 is a failure. Exit code 0: all passed, 1: something failed, 2: wrong usage.",
        epilog="First: ferrum-ref parity --backend my_package:kernels --small, where kernels = {'rms_norm': my_norm} "
        "and my_norm(x, weight, eps) takes and gives numpy arrays.",
    )
    parser.add_argument("--backend", metavar="NAME", help="a backend's name, or package.module:attribute")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda:0, ...")
    _add_selection(parser.add_argument_group("what is judged"))
    _add_reports(parser.add_argument_group("what comes of it"))
    _add_running(parser.add_argument_group("how it runs"))
    add_cache_option(parser)
    parser.set_defaults(func=run)


def _add_selection(group: Any) -> None:
    group.add_argument("--op", action="append", default=[], metavar="NAME", help="this operation; may be repeated")
    group.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="fp32, fp16, bf16; repeatable")
    group.add_argument("--case", type=int, metavar="N", help="only case N, told in full; needs one --op")
    group.add_argument("--small", action="store_true", help="leave out the cases that cost more than milliseconds")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="first seed of the random inputs (default 0)")
    group.add_argument("--seeds", type=int, default=1, metavar="K", help="number of seeds (default 1)")
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"judge this model's layers and logits only; by default {DEFAULT_MODEL} comes after the operations when "
        f"it is on this machine; '{NO_MODEL}' leaves it out",
    )
    group.add_argument(
        "--invariance",
        action="store_true",
        help="instead of bounds: the same call twice, rows alone, a later call: are the bits the same?",
    )
    group.add_argument(
        "--mutants", action="store_true", help="judge the judge instead: which suite kills which of its known bugs"
    )


def _add_reports(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument("--html", type=Path, metavar="FILE", help="write one page with the worst cases drawn")
    group.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML, for build servers")
    group.add_argument("--waivers", type=Path, metavar="FILE", help="known failures with reasons and dates, in TOML")


def _add_running(group: Any) -> None:
    group.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after that; skip the rest")
    group.add_argument(
        "--time-limit", type=float, default=60.0, metavar="SECONDS", help="of one case, in a process of its own (60)"
    )
    group.add_argument("--in-process", action="store_true", help="judge in this process: for debuggers")


def run(args: argparse.Namespace) -> int:
    """Judge; tables or JSON on stdout, progress and remarks on stderr.  [PA-CLI-1..5, PA-PRODUCT-1]"""
    from rich.console import Console

    from ferrum_ref.parity.cells import gather, has_failed
    from ferrum_ref.parity.runner import PASSED

    selection = _selection(args)
    if args.mutants:
        from ferrum_ref.cli.parity_mutants import run_mutants

        return run_mutants(
            range(args.seed, args.seed + args.seeds), args.json, _console(MATRIX_WIDTH), Console(stderr=True)
        )
    if args.invariance:
        from ferrum_ref.cli.parity_engine import open_judged

        return _print_invariance(args, open_judged(args.backend, args.device))
    notes = Console(stderr=True)
    only_model = args.model not in (None, NO_MODEL)
    with _reports(args) as reports:
        results = [] if only_model else _judge_operations(args, selection, notes)
        cells = gather(results)
        diagnoses, subject = _explained(args, results)
        _write_reports(args, reports, results, cells, subject, diagnoses)
    if not args.json:
        _print_operations(args, results, cells)
        for line in diagnoses:
            _console().print(line, markup=False)
    model, remark = _judge_model(args, selection, results, notes)
    if args.json:
        print(_as_json(args, cells, model, remark, diagnoses))
    elif model is not None:
        _print_model(args, model)
    if remark:
        print(remark, file=sys.stderr)
    judged = model is not None or any(cell.counts[PASSED] for cell in cells)
    return 1 if has_failed(cells) or not judged or (model is not None and not model.passed) else 0


@contextmanager
def _reports(args: argparse.Namespace) -> Iterator[dict[str, IO[str]]]:
    """The files to be written, open before anything is judged.  Raises FerrumIOError where one cannot be."""
    from ferrum_ref.errors import FerrumIOError

    with ExitStack() as stack:
        opened = {}
        for kind in ("html", "junit"):
            path = getattr(args, kind)
            if path is not None:
                try:
                    opened[kind] = stack.enter_context(path.open("w", encoding="utf-8"))
                except OSError as error:
                    raise FerrumIOError(f"parity: write {path}: {error.strerror or error}") from None
        yield opened


def _explained(args: argparse.Namespace, results: list[CaseResult]) -> tuple[list[str], Subject | None]:
    """Which known bugs explain the failures; and the subject, where it is wanted in this process and can be had."""
    from ferrum_ref.cli.parity_engine import open_judged
    from ferrum_ref.judging.diagnosis import diagnose
    from ferrum_ref.parity.runner import FAILED

    numbers = [result for result in results if result.status == FAILED and result.verdict is not None]
    if not results or _was_lost(results) or not (numbers or args.html):
        return [], None
    subject = open_judged(args.backend, args.device)
    return [str(one) for one in diagnose(subject, numbers)], subject


def _was_lost(results: list[CaseResult]) -> bool:
    """Whether a case hung or took its process with it: then this process does not run the subject."""
    return any(result.message.startswith(("no result within", "the process ")) for result in results)


def _write_reports(
    args: argparse.Namespace,
    reports: dict[str, IO[str]],
    results: list[CaseResult],
    cells: list[Cell],
    subject: Subject | None,
    diagnoses: list[str],
) -> None:
    if "junit" in reports:
        from ferrum_ref.judging.junit import junit_xml

        reports["junit"].write(junit_xml(args.backend, results))
    if "html" in reports:
        from ferrum_ref.judging.html import html_page

        reports["html"].write(html_page(f"Parity of {args.backend} on {args.device}", cells, subject, diagnoses))


def _print_invariance(args: argparse.Namespace, subject: Subject) -> int:
    """Prints which operations give the same bits twice, and alone as in a batch.  [PA-INVARIANT-3]"""
    from dataclasses import asdict

    from ferrum_ref.parity.invariance import check_all
    from ferrum_ref.parity.ops.catalogue import EVERY
    from ferrum_ref.parity.report import invariance_table

    operations = [one for one in EVERY if not args.op or one.name in args.op]
    found = list(check_all(subject, args.seed, operations, args.dtype))
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        _console().print(invariance_table(found, f"{args.backend} on {args.device}: same input, same bits?"))
    return 0 if found and all(one.passed for one in found) else 1


def _selection(args: argparse.Namespace) -> Selection:
    """Raises InvalidParameterError for options that contradict each other or name nothing."""
    from ferrum_ref.errors import InvalidParameterError
    from ferrum_ref.parity.runner import Selection

    if args.mutants == (args.backend is not None):
        raise InvalidParameterError("parity: give either --backend NAME or --mutants")
    if args.case is not None and len(args.op) != 1:
        raise InvalidParameterError("parity: --case counts the cases of one operation; give exactly one --op")
    if args.budget is not None and not args.budget > 0:
        raise InvalidParameterError(f"parity: --budget is {args.budget:g}, expected seconds above 0")
    selection = Selection(tuple(args.op), tuple(args.dtype), args.case, args.seed, args.seeds, args.small, True)
    selection.items()  # refuses unknown names before anything runs
    return selection


def _judge_operations(args: argparse.Namespace, selection: Selection, notes: Console) -> list[CaseResult]:
    import datetime

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ferrum_ref.judging.waivers import read_waivers, waived

    waivers = read_waivers(args.waivers) if args.waivers is not None else []
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    results = []
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("operations", total=len(selection.items()))
        with _cases(args, selection) as cases:
            for result in waived(cases, waivers, datetime.date.today()):
                results.append(result)
                progress.update(task, advance=1, description=f"{result.operation} {result.dtype}")
    return results


@contextmanager
def _cases(args: argparse.Namespace, selection: Selection) -> Iterator[Iterator[CaseResult]]:
    """The results as they come, from a process of their own or from this one."""
    from ferrum_ref.cli.parity_engine import open_judged

    if args.in_process:
        from ferrum_ref.parity.runner import run as run_cases

        yield run_cases(open_judged(args.backend, args.device), selection, args.budget)
    else:
        from ferrum_ref.judging.isolated import Isolated

        with Isolated(args.backend, args.device, open_judged, args.time_limit) as isolated:
            yield isolated.run(selection, args.budget)


def _judge_model(
    args: argparse.Namespace, selection: Selection, results: list[CaseResult], notes: Console
) -> tuple[ModelVerdict | None, str]:
    """The verdict, or None and why there is none."""
    from ferrum_ref.errors import NotFoundError, UnsupportedError
    from ferrum_ref.models.source import resolve_model

    if args.model == NO_MODEL:
        return None, ""
    if args.model is None and (selection.operations or selection.dtypes or selection.only_small):
        return None, ""
    if _was_lost(results):
        return None, "whole model left out: a case hung or took its process with it"
    try:
        path = resolve_model(args.model or DEFAULT_MODEL, cache_dir(args))
    except NotFoundError as error:
        if args.model is not None:
            raise
        return None, f"whole model left out: {error.message}"
    from rich.progress import Progress

    from ferrum_ref.cli.parity_engine import open_judged
    from ferrum_ref.cli.parity_model import judge_model_at
    from ferrum_ref.parity.subject import BackendSubject

    subject = open_judged(args.backend, args.device)
    if not isinstance(subject, BackendSubject):
        if args.model is not None:
            raise UnsupportedError(f"parity: {args.backend} is no backend; a model cannot run on functions")
        return None, "whole model left out: functions are no backend"
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
    from ferrum_ref.parity.cells import failures_in_turn
    from ferrum_ref.parity.report import case_lines, failure_lines, parity_table, summary_line

    out = _console()
    if cells:
        out.print(parity_table(cells, f"{args.backend} on {args.device}: largest err/bound, each bound derived"))
        out.print(
            "1 is the most that the declared arithmetic can err. det: every rounding at its worst; prob: roundings"
        )
        out.print(
            "independent; sharp: data independent too (honest runs exceed these two with probability 1e-9); stat: all"
        )
        out.print("elements together, where one undeclared rounding shows; -: does not apply.")
        out.print(summary_line(cells))
    failures = failures_in_turn(cells)
    for failure in failures[:MAX_FAILURES_SHOWN]:
        out.print("\n".join(failure_lines(failure)), markup=False)
    if len(failures) > MAX_FAILURES_SHOWN:
        out.print(
            f"... and {len(failures) - MAX_FAILURES_SHOWN} more; --op shows one operation's, --json lists them all"
        )
    if args.case is not None and not failures:
        for result in results:
            out.print("\n".join(case_lines(result)), markup=False)


def _print_model(args: argparse.Namespace, verdict: ModelVerdict) -> None:
    from ferrum_ref.parity.model_report import model_lines, model_table

    out = _console()
    out.print(model_table(verdict, f"{args.model or DEFAULT_MODEL} on {args.backend}, against a float64 run"))
    out.print("\n".join(model_lines(verdict)), markup=False)


def _console(width: int = TABLE_WIDTH) -> Console:
    """Standard output: as wide as the terminal, or as wide as the table in a file or pipe."""
    terminal = sys.stdout.isatty()
    return table_console(width=None if terminal else width, highlight=False, soft_wrap=not terminal)


def _as_json(
    args: argparse.Namespace, cells: list[Cell], model: ModelVerdict | None, remark: str, diagnoses: list[str]
) -> str:
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
        "diagnoses": diagnoses,
    }
    return json.dumps(document, indent=2, allow_nan=False)
