"""The judge as a test suite for someone else's repository.  Clauses: PA-PYTEST-1..2 (specs/judging.md).

pytest --pyargs ferrum_ref.parity --backend my_package:make_backend
"""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from ferrum_ref.judging.diagnosis import diagnose
from ferrum_ref.judging.isolated import Isolated
from ferrum_ref.judging.subject import open_subject
from ferrum_ref.judging.waivers import Waiver, waived
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import FAILED, PASSED, Selection

MAX_FAILURES_SHOWN = 5


def test_backend(
    cell: tuple[str, str], judged: Isolated, settings: Any, waivers: list[Waiver], today: datetime.date
) -> None:
    """Every case of one operation and element type lies within its bound."""
    operation, dtype = cell
    selection = Selection((operation,), (dtype,), None, 0, settings.seeds, settings.small)
    covering = [one for one in waivers if one.operation == operation and one.dtype in ("*", dtype)]
    results = list(waived(judged.run(selection), covering, today))
    failures = [result for result in results if result.status == FAILED]
    if failures:
        lines = [line for failure in failures[:MAX_FAILURES_SHOWN] for line in failure_lines(failure)]
        with_numbers = [failure for failure in failures if failure.verdict is not None]
        if with_numbers:
            lines += [str(one) for one in diagnose(open_subject(settings.backend, settings.device), with_numbers)]
        pytest.fail("\n".join([f"{len(failures)} of {len(results)} cases failed", *lines]), pytrace=False)
    if not any(result.status == PASSED for result in results):
        pytest.skip(f"{results[0].status}: {results[0].message}")
