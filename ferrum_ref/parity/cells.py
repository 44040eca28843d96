"""Results gathered by cell (operation x dtype).  Clauses: PA-REPORT-1..2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ferrum_ref.parity.runner import FAILED, PASSED, SKIPPED, UNSUPPORTED, WAIVED, CaseResult

STATUSES = (PASSED, FAILED, UNSUPPORTED, SKIPPED, WAIVED)


@dataclass(slots=True)
class Cell:
    """Counts and worst ratios of one operation on one dtype; every case is counted, whatever became of it."""

    operation: str
    dtype: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    ratio_det: float | None = None
    ratio_sharp: float | None = None
    worst: CaseResult | None = None
    failures: list[CaseResult] = field(default_factory=list)
    reason: str = ""
    ratio_prob: float | None = None
    ratio_statistical: float | None = None

    def add(self, result: CaseResult) -> None:
        """Counts one more case."""
        self.counts[result.status] += 1
        if result.status in (UNSUPPORTED, SKIPPED):
            self.reason = self.reason or result.message
            return
        if result.status == WAIVED:
            self.reason = self.reason or result.message
            return
        if result.status == FAILED:
            self.failures.append(result)
        if self.ratio_det is None or result.ratio_det > self.ratio_det:
            self.ratio_det, self.worst = result.ratio_det, result
        for tier in ("ratio_prob", "ratio_sharp", "ratio_statistical"):
            ratios = [ratio for ratio in (getattr(self, tier), getattr(result, tier)) if ratio is not None]
            setattr(self, tier, max(ratios, default=None))

    @property
    def status(self) -> str:
        """failed if any case failed; waived, unsupported or skipped if no case passed; passed otherwise."""
        for status in (FAILED, PASSED, WAIVED):
            if self.counts[status]:
                return status
        return UNSUPPORTED if self.counts[UNSUPPORTED] else SKIPPED

    @property
    def num_cases(self) -> int:
        return sum(self.counts.values())


def gather(results: Iterable[CaseResult]) -> list[Cell]:
    """One cell for each operation and dtype met, in the order of their first result."""
    cells: dict[tuple[str, str], Cell] = {}
    for result in results:
        key = (result.operation, result.dtype)
        cells.setdefault(key, Cell(*key)).add(result)
    return list(cells.values())


def failures_in_turn(cells: Sequence[Cell]) -> list[CaseResult]:
    """All failures: the worst of each cell, then the second of each, so that a few show every broken cell. Pure."""
    worst_first = [sorted(cell.failures, key=lambda failure: -failure.ratio_det) for cell in cells]
    rounds = max((len(failures) for failures in worst_first), default=0)
    return [failures[turn] for turn in range(rounds) for failures in worst_first if turn < len(failures)]


def has_failed(cells: Sequence[Cell]) -> bool:
    """True if any case of any cell failed."""
    return any(cell.counts[FAILED] for cell in cells)
