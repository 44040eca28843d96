"""From a name to what is judged."""

from __future__ import annotations

from typing import Any

import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError
from ferrum_ref.judging.subject import adapted, open_subject
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.runner import PASSED, UNSUPPORTED, run_case
from ferrum_ref.parity.subject import BackendSubject, FunctionSubject
from ferrum_ref.parity.units import STORAGES


@pytest.mark.clause("PA-OPEN-1")
@pytest.mark.parametrize("attribute", ["honest", "factory"])
def test_functions_by_name(attribute: str) -> None:
    subject = open_subject(f"subjects_for_tests:{attribute}")
    assert isinstance(subject, FunctionSubject)
    assert run_case(subject, operation_named("rms_norm"), STORAGES["bf16"], 0, 0).status == PASSED
    assert run_case(subject, operation_named("linear"), STORAGES["bf16"], 0, 0).status == UNSUPPORTED


@pytest.mark.clause("PA-OPEN-1")
def test_backends_by_name_and_by_factory() -> None:
    for name in ("numpy", "ferrum_ref.numpy_backend:make_backend"):
        subject = open_subject(name)
        assert isinstance(subject, BackendSubject)
        assert subject.backend.name() == "numpy"


@pytest.mark.clause("PA-OPEN-1", "PA-OPEN-2")
@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("nobody", NotFoundError, "nobody"),
        ("no_such_module:x", NotFoundError, "there is no module 'no_such_module'"),
        ("subjects_for_tests:absent", NotFoundError, "has no 'absent'"),
        ("subjects_for_tests:number", BackendError, "is int, expected a ComputeBackend, a Subject"),
        ("subjects_for_tests:broken_factory", BackendError, "the factory failed with OSError: no such library"),
        ("subjects_for_tests:unknown", InvalidParameterError, "rms_morn"),
        ("subjects_for_tests:not_functions", InvalidParameterError, "rms_norm is int, expected a function"),
        ("a b:c", InvalidParameterError, "expected a name or 'package"),
    ],
)
def test_names_that_lead_nowhere(name: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        open_subject(name)


@pytest.mark.clause("PA-OPEN-2")
def test_a_function_declares_by_an_attribute(subjects: Any) -> None:
    subject = adapted("mine", {"rms_norm": subjects.wide_sums})
    assert subject.declared(operation_named("rms_norm")).accumulate == "fp64"
    assert subject.declared(operation_named("linear")).accumulate == "fp32"
