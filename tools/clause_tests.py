#!/usr/bin/env python3
"""Which tests prove these clauses?  `clause_tests.py BK DB-STEP KN-ROPE-2 D-24` prints their pytest names, one a line.

An argument is a whole id, the beginning of one up to a hyphen, or a defect of upstream (D-01 … D-83), which stands for
the clauses that speak of it. `--defects` prints every defect that a clause speaks of, its clauses and how many tests
name them. Exit 1 when an argument fits no tested clause.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

from check_clauses import CLAUSE, Index, index_of

DEFECT = re.compile(r"\bD-\d\d\b")


def defects_of(specs: Path) -> Index:
    """{defect: the clauses whose own text names it}."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(specs.rglob("*.md")):
        pieces = CLAUSE.split(path.read_text("utf-8"))[1:]
        for id_, text in zip(pieces[::2], pieces[1::2], strict=True):
            paragraph = text.partition("\n\n")[0]
            for defect in DEFECT.findall(paragraph):
                found[defect].add(id_)
    return {defect: sorted(found[defect]) for defect in sorted(found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clauses", nargs="*", metavar="CLAUSE")
    parser.add_argument("--defects", action="store_true", help="print each defect, its clauses and its number of tests")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    arguments = parser.parse_args()
    if not arguments.clauses and not arguments.defects:
        parser.error("name a clause, a defect, or --defects")
    index, defects = index_of(arguments.root), defects_of(arguments.root / "specs")
    if arguments.defects:
        for defect, ids in defects.items():
            print(f"{defect}: {', '.join(ids)} ({len({test for id_ in ids for test in index.get(id_, [])})} tests)")
    found: set[str] = set()
    unknown = []
    for wanted in arguments.clauses:
        ids = defects.get(wanted) or [id_ for id_ in index if f"{id_}-".startswith(f"{wanted}-")]
        tests = {test for id_ in ids for test in index.get(id_, [])}
        found |= tests
        if not tests:
            unknown.append(wanted)
    for wanted in unknown:
        print(f"no test names a clause {wanted}", file=sys.stderr)
    if found:
        print("\n".join(sorted(found)))
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
