#!/usr/bin/env python3
"""Every clause of specs/ is named by a test, and every clause that a test names exists.

A clause is a paragraph of specs/*.md that starts a line with `**ID** `; a test names it with
`@pytest.mark.clause("ID", …)`. Prints tested/total; exit 1 on an unknown, untested or doubly defined id.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CLAUSE = re.compile(r"^\*\*([A-Z]{2}-[A-Z0-9]+-\d+)\*\* ", re.MULTILINE)


def defined(specs: Path) -> Counter[str]:
    return Counter(id_ for path in sorted(specs.rglob("*.md")) for id_ in CLAUSE.findall(path.read_text("utf-8")))


def named_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "clause":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    clauses = defined(root / "specs")
    named = {id_: str(p.relative_to(root)) for p in sorted((root / "tests").rglob("test_*.py")) for id_ in named_in(p)}
    twice = sorted(id_ for id_, count in clauses.items() if count > 1)
    unknown = sorted(id_ for id_ in named if id_ not in clauses)
    untested = sorted(id_ for id_ in clauses if id_ not in named)
    for id_ in twice:
        print(f"clause defined twice: {id_}")
    for id_ in unknown:
        print(f"unknown clause: {id_} named in {named[id_]}")
    for id_ in untested:
        print(f"untested clause: {id_}")
    print(f"clauses: {len(clauses) - len(untested)} tested of {len(clauses)}")
    return 1 if twice or unknown or untested else 0


if __name__ == "__main__":
    sys.exit(main())
