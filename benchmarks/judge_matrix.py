"""How good is the judge? Mutants killed and false alarms, beside four hand-set suites; dated JSON in results/.

    python benchmarks/judge_matrix.py [--seeds 10] [--honest-seeds 4] [--out FOLDER]

Every kernel mutant in each dtype and every engine mutant on each seed; every honest algorithm on every small case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

from ferrum_ref.cli.parity_engine import reference_parts
from ferrum_ref.parity.honest.catalogue import HONEST
from ferrum_ref.parity.mutants.matrix import SUITES, engine_matrix, honest_matrix, kill_matrix, killed_share
from ferrum_ref.parity.mutants.report import matrix_lines, rows_as_json
from ferrum_ref.parity.ops.catalogue import EVERY

RESULTS = Path(__file__).parent / "results"


def honest_figures(seeds: range) -> dict[str, Any]:
    """Runs and false alarms, in all and by operation."""
    counts = honest_matrix(seeds)
    runs = sum(one.runs for one in counts.values())
    return {
        "seeds": list(seeds),
        "runs": runs,
        "algorithms": {operation.name: sum(one.operation == operation.name for one in HONEST) for operation in EVERY},
        "false_alarms": {suite: sum(one.alarms.get(suite, 0) for one in counts.values()) for suite in SUITES},
        "by_operation": {name: {"runs": one.runs, "alarms": one.alarms} for name, one in counts.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, metavar="K", help="seeds of the mutants (default 10)")
    parser.add_argument("--honest-seeds", type=int, default=4, metavar="K", help="seeds of the honest runs (default 4)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    args = parser.parse_args()
    seeds, start = range(args.seeds), time.perf_counter()
    rows = kill_matrix(seeds) + engine_matrix(reference_parts(), seeds)
    killed_s = time.perf_counter() - start
    honest = honest_figures(range(1000, 1000 + args.honest_seeds))
    document = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "seconds": {"mutants": round(killed_s, 1), "honest": round(time.perf_counter() - start - killed_s, 1)},
        "killed_share": killed_share(rows),
        "killed_share_by_seed": [killed_share(rows, seed) for seed in seeds],
        "honest": honest,
        "mutants": rows_as_json(rows),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{document['date']}_judge_matrix.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(matrix_lines(rows, seeds)))
    print(f"{honest['runs']} honest runs, false alarms: {honest['false_alarms']}")
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
