#!/usr/bin/env python3
"""Which tests prove these clauses?  `clause_tests.py BK DB-STEP KN-ROPE-2` prints their pytest names, one a line.

An argument is a whole id or the beginning of one, up to a hyphen. Exit 1 when an argument fits no tested clause.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from check_clauses import index_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clauses", nargs="+", metavar="CLAUSE")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    arguments = parser.parse_args()
    index = index_of(arguments.root)
    found: set[str] = set()
    unknown = []
    for wanted in arguments.clauses:
        tests = {test for id_, tests in index.items() if f"{id_}-".startswith(f"{wanted}-") for test in tests}
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
