"""`ferrum-ref parity --mutants`: how good the judge is, beside four hand-set suites.  [PA-MUTANT-5]"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ferrum_ref.parity.mutants.matrix import MatrixRow


def run_mutants(seeds: range, as_json: bool, out: Console, notes: Console) -> int:
    """Prints the kill matrix. 0: at least 98 % of the mutants are killed on every seed, 1: fewer."""
    from ferrum_ref.parity.mutants.matrix import REQUIRED_SHARE, killed_share
    from ferrum_ref.parity.mutants.report import matrix_lines, matrix_table, rows_as_json, summary_table

    rows = _matrix(seeds, notes)
    share = min(killed_share(rows, seed) for seed in seeds)
    if as_json:
        document = {"seeds": list(seeds), "killed_share": killed_share(rows), "worst_seed": share}
        print(json.dumps({**document, "mutants": rows_as_json(rows)}, indent=2))
    else:
        out.print(matrix_table(rows, "of its (dtype, seed) pairs, how many each suite rejects"))
        out.print("Hand-set tolerances see random inputs; '+probes': the judge's own cases. '-': not for kernels.")
        out.print(summary_table(rows))
        out.print("\n".join(matrix_lines(rows, seeds)), markup=False)
    return 0 if share >= REQUIRED_SHARE else 1


def _matrix(seeds: range, notes: Console) -> list[MatrixRow]:
    from rich.progress import Progress

    from ferrum_ref.cli.parity_engine import reference_parts
    from ferrum_ref.parity.mutants.matrix import engine_matrix, kill_matrix

    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:

        def shown(description: str) -> Callable[[int, int], None]:
            task = progress.add_task(description)
            return lambda done, total: progress.update(task, completed=done, total=total)

        rows = kill_matrix(seeds, progress=shown("kernel mutants"))
        return rows + engine_matrix(reference_parts(), seeds, progress=shown("engine mutants"))
