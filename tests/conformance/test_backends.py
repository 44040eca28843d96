"""Every cell of the installed backends: all cases pass, nothing is unsupported, and the bounds are not slack."""

from __future__ import annotations

import pytest

from ferrum_ref.parity.cells import gather
from ferrum_ref.parity.ops.catalogue import OPERATIONS
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import PASSED, Selection, run
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.plugins import load_backend

EXACT = {"write_kv", "embedding", "argmax"}


@pytest.fixture(scope="module", params=["numpy", "torch"])
def subject(request: pytest.FixtureRequest) -> BackendSubject:
    if request.param == "torch":
        pytest.importorskip("torch")
    return BackendSubject(load_backend(request.param), request.param)


@pytest.mark.clause("PA-CASE-1", "PA-CASE-2", "PA-GUARD-2", "PA-SUBJECT-1", "PA-RUN-4")
@pytest.mark.parametrize("operation", [operation.name for operation in OPERATIONS])
def test_every_case_passes_within_tight_bounds(subject: BackendSubject, operation: str) -> None:
    cells = gather(run(subject, Selection(operations=[operation])))
    assert [cell.dtype for cell in cells] == ["fp32", "fp16", "bf16"]
    for cell in cells:
        assert not cell.failures, "\n".join(failure_lines(cell.failures[0]))
        assert cell.counts[PASSED] == cell.num_cases
        assert cell.ratio_det is not None
        if operation in EXACT:
            assert cell.ratio_det == 0.0
        elif cell.dtype == "fp32":
            assert 0.05 < cell.ratio_det <= 1.0
        else:
            assert 0.3 <= cell.ratio_det <= 1.0


@pytest.mark.slow
@pytest.mark.clause("PA-GUARD-5")
def test_further_seeds_pass_too(subject: BackendSubject) -> None:
    selection = Selection(first_seed=1, num_seeds=8, only_small=True)
    cells = gather(run(subject, selection))
    assert not [failure_lines(failure) for cell in cells for failure in cell.failures]
