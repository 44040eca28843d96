"""`ferrum-ref vectors`: golden vectors by which a port in any language is judged.  [GV-CHECK-1..7, GV-WRITE-1]"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferrum_ref.program import EXIT_FOUND_FAILURE, OneLineParser

if TYPE_CHECKING:
    from ferrum_ref.vectors.schema import Vector
    from ferrum_ref.vectors.verify import Check, VectorResult

MAX_NAMED = 4  # tensors that nobody asked for


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "vectors",
        help="golden vectors for ports in other languages: write, list, check outputs",
        description="Golden vectors: the inputs of single operations, their float64 results and the largest permitted "
        "error of every element, in JSON and safetensors files that need no Python. The set comes with the source "
        "tree, in specs/vectors.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=OneLineParser)
    write = verbs.add_parser("write", help="write the set", description="Write the set, the same bytes every time.")
    write.add_argument("directory", type=Path, metavar="DIR", help="where to; made if need be")
    check = verbs.add_parser(
        "check",
        help="judge a file of outputs",
        description="Judge OUTPUTS: output y of vector V is its tensor 'V/y'. Exit code 0: every vector passes, 1: one "
        "does not (missing ones included), 2: a file cannot be read. --op and --dtype say what is asked for.",
    )
    check.add_argument("directory", type=Path, metavar="DIR", help="the set")
    check.add_argument("outputs", type=Path, metavar="OUTPUTS", help="a safetensors file")
    listed = verbs.add_parser("list", help="list the set", description="List the vectors and why each exists.")
    listed.add_argument("directory", type=Path, metavar="DIR", help="the set")
    for verb, run in ((write, run_write), (check, run_check), (listed, run_list)):
        verb.add_argument("--op", action="append", default=[], metavar="NAME", help="this operation; may be repeated")
        verb.add_argument("--dtype", action="append", default=[], metavar="TYPE", help="fp32, fp16, bf16; repeatable")
        verb.set_defaults(func=run)
    for verb in (check, listed):
        verb.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run_write(args: argparse.Namespace) -> int:
    """Write; what was written on stdout, progress on stderr.  [GV-WRITE-1]"""
    from rich.console import Console
    from rich.progress import Progress

    from ferrum_ref.vectors.schema import MANIFEST
    from ferrum_ref.vectors.write import write_vectors

    notes = Console(stderr=True)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("vectors")
        manifest = write_vectors(
            args.directory,
            args.op,
            args.dtype,
            lambda done, total, name: progress.update(task, completed=done, total=total, description=name or "files"),
        )
    num_bytes = sum(entry.num_bytes for entry in manifest.operations.values())
    num_bytes += (args.directory / MANIFEST).stat().st_size
    print(
        f"{args.directory}: {len(manifest.vectors)} vectors of {len(manifest.operations)} operations, {num_bytes} bytes"
    )
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Judge; a line for each vector, or JSON.  [GV-CHECK-1..7]"""
    from ferrum_ref.vectors.verify import check_outputs

    check = check_outputs(args.directory, args.outputs, args.op, args.dtype)
    if args.json:
        print(json.dumps(check_as_json(check), indent=2, allow_nan=False))
    else:
        print("\n".join(check_lines(check)))
    return 0 if check.passed else EXIT_FOUND_FAILURE


def run_list(args: argparse.Namespace) -> int:
    """List; a line for each vector, or JSON."""
    from ferrum_ref.vectors.read import read_manifest
    from ferrum_ref.vectors.verify import select

    manifest = read_manifest(args.directory)
    vectors = select(manifest, args.op, args.dtype)
    if args.json:
        rows = [
            {"name": v.name, "operation": v.operation, "storage": v.storage, "flags": v.flags, "clauses": v.clauses}
            for v in vectors
        ]
        print(json.dumps(rows, indent=2))
        return 0
    for name, entry in manifest.operations.items():
        group = [vector for vector in vectors if vector.operation == name]
        if group:
            print(f"{name}: {entry.meaning}")
            print("\n".join(_list_lines(group)))
    return 0


def _list_lines(group: list[Vector]) -> list[str]:
    """Name, sizes and reasons, in columns. Pure."""
    sizes = [", ".join(f"{one.name} {list(one.shape)}" for one in vector.inputs) for vector in group]
    widths = max(len(vector.name) for vector in group), max(map(len, sizes))
    return [
        f"  {vector.name:<{widths[0]}}  {size:<{widths[1]}}  {', '.join(vector.flags)}"
        for vector, size in zip(group, sizes, strict=True)
    ]


def check_lines(check: Check) -> list[str]:
    """The verdicts, what is wrong with those that fail, and the count. Pure."""
    from ferrum_ref.vectors.verify import PASS, STATUSES

    width = max(len(result.vector.name) for result in check.results)
    lines = []
    for result in check.results:
        worst = result.worst
        lines.append(f"{worst.status:<11}  {result.vector.name:<{width}}  {_ratio_text(result)}".rstrip())
        lines += [f"    {one.message}" for one in result.outputs if one.message]
        if worst.status != PASS:
            lines.append(f"    why it exists: {', '.join(result.vector.flags)}; {', '.join(result.vector.clauses)}")
    statuses = [result.worst.status for result in check.results]
    rest = [f"{statuses.count(status)} {status}" for status in STATUSES if status != PASS and status in statuses]
    lines.append(f"{statuses.count(PASS)} of {len(statuses)} vectors pass" + (f": {', '.join(rest)}" if rest else ""))
    if check.unexpected:
        more = ", ..." if len(check.unexpected) > MAX_NAMED else ""
        named = ", ".join(check.unexpected[:MAX_NAMED])
        lines.append(f"note: {len(check.unexpected)} tensors that no vector of the set asks for: {named}{more}")
    return lines


def _ratio_text(result: VectorResult) -> str:
    if not math.isfinite(result.worst.ratio):
        return ""
    exact = all(output.exact for output in result.vector.outputs)
    return "exact" if exact else f"err/bound {result.worst.ratio:.3g}"


def check_as_json(check: Check) -> dict[str, Any]:
    """The same as one object; a ratio that is not finite is null. Pure.  [GV-CHECK-7]"""
    from ferrum_ref.vectors.verify import PASS

    rows = [
        {
            "name": result.vector.name,
            "operation": result.vector.operation,
            "storage": result.vector.storage,
            "status": result.worst.status,
            "ratio": result.worst.ratio if math.isfinite(result.worst.ratio) else None,
            "messages": [one.message for one in result.outputs if one.message],
            "flags": result.vector.flags,
            "clauses": result.vector.clauses,
        }
        for result in check.results
    ]
    return {
        "passed": check.passed,
        "num_vectors": len(rows),
        "num_passed": sum(row["status"] == PASS for row in rows),
        "vectors": rows,
        "unexpected": check.unexpected,
    }
