"""Every cell of the installed backends: all cases pass, or are unsupported for a known reason."""

from __future__ import annotations

import asyncio

import pytest

from ferrum_ref.cli.parity_engine import decode_backend
from ferrum_ref.parity.cells import gather
from ferrum_ref.parity.invariance import BATCHED, check_all
from ferrum_ref.parity.ops.catalogue import EVERY, operation_named
from ferrum_ref.parity.ops.packed import PACKED
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import PASSED, UNSUPPORTED, Selection, run
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.parity.tightness import REASONS, is_tight
from ferrum_ref.plugins import load_backend

OVER_LISTS = {"batch_matmul", "stack", "unstack", "pad_batch"}
AWAITED = {"matmul_async", "softmax_async"}
SCHEMES = {operation.name for operation in PACKED}


@pytest.fixture(scope="module", params=["numpy", "torch"])
def subject(request: pytest.FixtureRequest) -> BackendSubject:
    if request.param == "torch":
        pytest.importorskip("torch")
    return BackendSubject(load_backend(request.param), request.param, decode=decode_backend)


@pytest.mark.clause("PA-CASE-1", "PA-CASE-2", "PA-GUARD-2", "PA-SUBJECT-1", "PA-RUN-4", "PA-TIGHT-1", "PA-DECODE-2")
@pytest.mark.parametrize("operation", [operation.name for operation in EVERY])
def test_every_case_passes_within_tight_bounds(subject: BackendSubject, operation: str) -> None:
    small = operation in ("attention", "paged_attention", "sample_token")  # the long contexts have a test of their own
    cells = gather(run(subject, Selection(operations=[operation], only_small=small)))
    assert [cell.dtype for cell in cells] == ["fp32", "fp16", "bf16"]
    for cell in cells:
        assert not cell.failures, "\n".join(failure_lines(cell.failures[0]))
        if cell.counts[UNSUPPORTED]:
            assert operation in OVER_LISTS | AWAITED | (SCHEMES if subject.name != "numpy" else set()), cell.reason
            continue
        assert cell.counts[PASSED] == cell.num_cases
        assert cell.ratio_det is not None
        assert is_tight(operation, cell.dtype, cell.ratio_det, cell.ratio_prob) or (operation, cell.dtype) in REASONS


@pytest.mark.clause("PA-CASE-1")
def test_numpys_operations_over_lists_and_awaited_ones_pass() -> None:
    backend = load_backend("numpy")
    subject = BackendSubject(backend, "numpy")
    for cell in gather(run(subject, Selection(operations=sorted(OVER_LISTS | AWAITED)))):
        assert not cell.failures, "\n".join(failure_lines(cell.failures[0]))
        assert cell.counts[PASSED] == cell.num_cases
    asyncio.run(backend.shutdown())


@pytest.mark.clause("PA-INVARIANT-1", "PA-INVARIANT-2")
def test_the_numpy_backend_repeats_itself_and_rows_alone_keep_their_bounds() -> None:
    subject = BackendSubject(load_backend("numpy"), "numpy")
    found = list(check_all(subject, 0, [operation_named(name) for name in BATCHED]))
    assert len(found) == 3 * len(BATCHED)
    assert not [one for one in found if not one.passed]


@pytest.mark.slow
@pytest.mark.clause("PA-CASE-2", "PA-NEEDLE-1")
@pytest.mark.parametrize("operation", ["attention", "paged_attention", "sample_token"])
def test_long_contexts_and_many_draws_pass(subject: BackendSubject, operation: str) -> None:
    cells = gather(run(subject, Selection(operations=[operation])))
    assert not [failure_lines(failure) for cell in cells for failure in cell.failures]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.clause("PA-GUARD-5")
def test_further_seeds_pass_too(subject: BackendSubject) -> None:
    selection = Selection(first_seed=1, num_seeds=8, only_small=True)
    cells = gather(run(subject, selection))
    assert not [failure_lines(failure) for cell in cells for failure in cell.failures]
