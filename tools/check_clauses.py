#!/usr/bin/env python3
"""Every clause of specs/ is named by a test, every clause a test names exists, no test of a clause has vanished.

A clause is a paragraph of specs/*.md that starts a line with `**ID** `; a test names it with
`@pytest.mark.clause("ID", …)`. Which test proves which clauses is written down in specs/tests.json; `--write` brings
it up to date. Prints tested/total; exit 1 on an unknown, untested or doubly defined id, and on any difference between
specs/tests.json and the tests: a test of a clause that was deleted or renamed does not go unnoticed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

CLAUSE = re.compile(r"^\*\*([A-Z]{2}-[A-Z0-9]+-\d+)\*\* ", re.MULTILINE)
Index = dict[str, list[str]]


def defined(specs: Path) -> Counter[str]:
    return Counter(id_ for path in sorted(specs.rglob("*.md")) for id_ in CLAUSE.findall(path.read_text("utf-8")))


def clauses_of(nodes: list[ast.expr]) -> Iterator[str]:
    for expression in nodes:
        for node in ast.walk(expression):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "clause":
                yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def named_in(tree: ast.Module | ast.ClassDef, owner: str) -> Iterator[tuple[str, str]]:
    """(clause, test) pairs; a mark on a class counts for the class, one in `pytestmark` for the file."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from ((id_, f"{owner}::{node.name}") for id_ in clauses_of(node.decorator_list))
        elif isinstance(node, ast.ClassDef):
            yield from ((id_, f"{owner}::{node.name}") for id_ in clauses_of(node.decorator_list))
            yield from named_in(node, f"{owner}::{node.name}")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            yield from ((id_, owner) for id_ in clauses_of([node.value]))


def index_of(root: Path) -> Index:
    index: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        for id_, test in named_in(tree, path.relative_to(root).as_posix()):
            index[id_].add(test)
    return {id_: sorted(index[id_]) for id_ in sorted(index)}


def by_test(index: Index) -> dict[str, dict[str, list[str]]]:
    """{file: {test: clauses}}: the same pairs as they are recorded."""
    record: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for id_, tests in index.items():
        for test in tests:
            path, _, name = test.partition("::")
            record[path][name].append(id_)
    return {path: dict(sorted(tests.items())) for path, tests in sorted(record.items())}


def by_clause(record: dict[str, dict[str, list[str]]]) -> Index:
    index: defaultdict[str, list[str]] = defaultdict(list)
    for path, tests in record.items():
        for name, ids in tests.items():
            for id_ in ids:
                index[id_].append(f"{path}::{name}" if name else path)
    return index


def differences(recorded: Index, found: Index) -> Iterator[str]:
    for id_ in sorted({*recorded, *found}):
        before, now = set(recorded.get(id_, [])), set(found.get(id_, []))
        yield from (f"test of a clause has vanished: {id_} was proven by {test}" for test in sorted(before - now))
        yield from (f"test of a clause is not recorded: {id_} by {test}" for test in sorted(now - before))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write specs/tests.json from the tests as they are")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    arguments = parser.parse_args()
    record = arguments.root / "specs" / "tests.json"
    clauses, found = defined(arguments.root / "specs"), index_of(arguments.root)
    if arguments.write:
        record.write_text(json.dumps(by_test(found), indent=1) + "\n", "utf-8")
    untested = sorted(id_ for id_ in clauses if id_ not in found)
    complaints = [f"clause defined twice: {id_}" for id_, count in sorted(clauses.items()) if count > 1]
    complaints += [f"unknown clause: {id_} named in {found[id_][0]}" for id_ in found if id_ not in clauses]
    complaints += [f"untested clause: {id_}" for id_ in untested]
    if not record.exists():
        complaints.append("specs/tests.json is missing")
    changed = list(differences(by_clause(json.loads(record.read_text("utf-8"))), found)) if record.exists() else []
    for line in complaints + changed:
        print(line)
    if changed:
        print(f"if that is meant: {Path(sys.argv[0]).name} --write records the tests as they are")
    print(f"clauses: {len(clauses) - len(untested)} tested of {len(clauses)}")
    return 1 if complaints or changed else 0


if __name__ == "__main__":
    sys.exit(main())
