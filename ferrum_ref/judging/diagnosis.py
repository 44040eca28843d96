"""Which known bug explains the failures?  Clauses: PA-DIAGNOSIS-1..3 (specs/judging.md).

The judge's own library of bugs is run on the inputs of a failed case: where a bug's result and the subject's agree
within the bound of honest rounding, that bug explains the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrum_ref.errors import FerrumError
from ferrum_ref.parity.mutants.catalogue import MUTANTS
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.operation import Expected
from ferrum_ref.parity.runner import FAILED, CaseResult, draw_case
from ferrum_ref.parity.subject import Subject
from ferrum_ref.parity.units import Array, storage_named

MAX_CASES: Final = 8
AGREEMENT: Final = 2.0  # two runs of one arithmetic differ by twice its bound at most


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A known bug and how many of the looked-at failures it explains."""

    operation: str
    dtype: str
    bug: str
    explained: int
    looked_at: int

    def __str__(self) -> str:
        return (
            f"{self.operation} {self.dtype}: this looks like the bug {self.bug!r}: "
            f"it gives the same numbers in {self.explained} of {self.looked_at} failed cases"
        )


def diagnose(subject: Subject, results: Sequence[CaseResult]) -> list[Diagnosis]:
    """The bug of the library that explains most failures of each operation and type, if one explains half.

    [PA-DIAGNOSIS-1..3]  Looks at up to 8 failed cases of each. Calls the subject once more for each; pure otherwise.
    """
    cells: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        if result.status == FAILED and result.verdict is not None:
            cells.setdefault((result.operation, result.dtype), []).append(result)
    return [found for cell, failures in cells.items() if (found := _best(subject, *cell, failures[:MAX_CASES]))]


def _best(subject: Subject, operation: str, dtype: str, failures: Sequence[CaseResult]) -> Diagnosis | None:
    names = (operation, operation_named(operation).algorithm_name)  # matmul_async is matmul by another way
    bugs = [bug for bug in MUTANTS if bug.operation in names and dtype in bug.dtypes]
    counts = dict.fromkeys(range(len(bugs)), 0)
    for failure in failures:
        for index in _explaining(subject, bugs, failure):
            counts[index] += 1
    if not counts:
        return None
    index = max(counts, key=lambda one: counts[one])
    if 2 * counts[index] < len(failures) or not counts[index]:
        return None
    return Diagnosis(operation, dtype, bugs[index].name, counts[index], len(failures))


def _explaining(subject: Subject, bugs: Sequence[Mutant], failure: CaseResult) -> list[int]:
    """Which bugs give the subject's numbers on this case."""
    operation, storage = operation_named(failure.operation), storage_named(failure.dtype)
    inputs = draw_case(operation, storage, failure.case_index, failure.seed)
    with np.errstate(all="ignore"):
        expected = operation.expect(inputs, subject.declared(operation))
        try:
            outputs = subject.run(operation, inputs)
        except Exception:  # noqa: BLE001  the subject may raise anything; then there are no numbers to explain
            return []
        found = []
        for index, bug in enumerate(bugs):
            try:
                told = bug.run(inputs)
            except (FerrumError, ValueError, IndexError, KeyError, ZeroDivisionError):  # it does not fit this case
                continue
            if _agree(expected, outputs, told):
                found.append(index)
    return found


def _agree(expected: Sequence[Expected], outputs: Sequence[Array], told: Sequence[Array]) -> bool:
    if len(outputs) != len(told) or len(outputs) != len(expected):
        return False
    for wanted, ours, bug in zip(expected, outputs, told, strict=True):
        if ours.shape != bug.shape or ours.dtype != wanted.dtype or wanted.choice is not None:
            return False
        first, second = ours.astype(np.float64), bug.astype(np.float64)
        same = (first == second) | (np.isnan(first) & np.isnan(second))
        scale = np.abs(second) / np.maximum(np.abs(wanted.value.astype(np.float64)), np.finfo(np.float64).tiny)
        allowed = 0.0 if wanted.det is None else AGREEMENT * wanted.det * np.maximum(1.0, scale)
        if not np.all(same | (np.abs(first - second) <= allowed)):
            return False
    return True
