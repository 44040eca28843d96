"""Kernels that hang, crash, exit or raise cost their cases, and nothing else."""

from __future__ import annotations

import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError
from ferrum_ref.judging.isolated import DEVICE_LOST, Isolated
from ferrum_ref.judging.subject import open_subject
from ferrum_ref.parity.runner import FAILED, PASSED, SKIPPED, CaseResult, Selection, run

ONE = Selection(("rms_norm",), ("fp32",), only_small=True)


def judged(attribute: str, selection: Selection = ONE, time_limit_s: float = 20.0) -> list[CaseResult]:
    with Isolated(f"subjects_for_tests:{attribute}", "cpu", open_subject, time_limit_s) as isolated:
        return list(isolated.run(selection))


@pytest.mark.clause("PA-ISOLATED-1")
def test_the_results_are_those_of_this_process() -> None:
    subject = open_subject("subjects_for_tests:honest")
    here = list(run(subject, ONE))
    assert judged("honest") == here
    assert {result.status for result in here} == {PASSED}


@pytest.mark.clause("PA-ISOLATED-2")
def test_a_hang_is_a_failure_of_its_case() -> None:
    results = judged("hanging", time_limit_s=1.5)
    lost = [result for result in results if result.status != PASSED]
    assert lost
    assert all("x3x" in result.label or result.label.startswith("shape=") for result in lost)
    assert lost[0].status == FAILED
    assert lost[0].message.startswith("no result within 1.5 s: the kernel hangs")
    assert "--op rms_norm --dtype fp32 --case" in lost[0].reproduce
    assert any(result.status == PASSED for result in results[results.index(lost[0]) + 1 :])


@pytest.mark.clause("PA-ISOLATED-3")
def test_a_crash_and_an_exit_are_failures_of_their_cases() -> None:
    results = judged("crashing")
    messages = [result.message for result in results if result.status == FAILED]
    assert "the process died (SIGSEGV)" in messages
    assert "the process ended with code 7" in messages


@pytest.mark.clause("PA-ISOLATED-5")
def test_a_case_that_loses_the_device_costs_no_other_case() -> None:
    results = judged("spoiling")
    failed = [result for result in results if result.status == FAILED]
    assert [result.label for result in failed] == [r.label for r in judged("crashing") if "SIGSEGV" in r.message]
    assert failed[0].message.endswith("illegal memory access was encountered; the next case runs in a new process")
    assert sum(result.status == PASSED for result in results) == len(results) - len(failed)


@pytest.mark.clause("PA-ISOLATED-5")
@pytest.mark.parametrize(
    "message",
    [
        "cudaErrorIllegalAddress: an illegal memory access was encountered",
        "[700] Call to cuMemcpyDtoH results in CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA error: device-side assert triggered",
        "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "cudaErrorLaunchTimeout: the launch timed out and was terminated",
    ],
)
def test_the_errors_that_lose_a_device(message: str) -> None:
    assert DEVICE_LOST.search(f"raised RuntimeError: {message}")
    assert not DEVICE_LOST.search("raised CudaAPIError: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    assert not DEVICE_LOST.search("raised ShapeError: launch: got a shape (3, 0)")


@pytest.mark.clause("PA-ISOLATED-4")
def test_a_cell_that_is_lost_twice_is_not_asked_again() -> None:
    several = Selection(("rms_norm",), ("fp32",), num_seeds=3, only_small=True)
    results = judged("crashing", several)
    assert sum(result.message.startswith("the process") for result in results) == 2
    skipped = [result for result in results if result.status == SKIPPED]
    assert skipped
    assert skipped[0].message == "2 cases of this operation and type were lost before"


@pytest.mark.clause("PA-ISOLATED-1", "PA-ISOLATED-4")
def test_what_cannot_be_opened_is_told_here() -> None:
    for name, kind in (
        ("subjects_for_tests:absent", NotFoundError),
        ("subjects_for_tests:broken_factory", BackendError),
    ):
        with pytest.raises(kind), Isolated(name, "cpu", open_subject):
            pass
    with pytest.raises(InvalidParameterError, match="the time limit is 0 s"):
        Isolated("numpy", "cpu", open_subject, 0.0)


@pytest.mark.clause("PA-ISOLATED-1")
def test_a_budget_skips_the_rest() -> None:
    times = iter([0.0, 0.0, 0.0, 5.0, *[6.0] * 100])
    with Isolated("subjects_for_tests:honest", "cpu", open_subject) as isolated:
        results = list(isolated.run(ONE, 4.0, lambda: next(times)))
    assert [result.status for result in results[:3]] == [PASSED, PASSED, SKIPPED]
    assert results[-1].message == "the budget of 4 s was used up"


@pytest.mark.clause("PA-ISOLATED-3")
@pytest.mark.parametrize(
    ("attribute", "said"),
    [("raising", "ZeroDivisionError: a kernel's own mistake"), ("nan", "err/bound is inf"), ("flat", "shape (")],
)
def test_other_bad_behaviour_is_a_verdict_too(attribute: str, said: str) -> None:
    results = judged(attribute, Selection(("rms_norm",), ("fp32",), case_index=1))
    assert [result.status for result in results] == [FAILED]
    assert said in results[0].message
