"""Thousands of honest runs by different algorithms: none may be called wrong, and the bounds may not be slack."""

from __future__ import annotations

from collections import defaultdict

import honest
import numpy as np
import pytest

from ferrum_ref.parity.ops.catalogue import OPERATIONS, operation_named
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import FAILED, CaseResult, draw_case, judged
from ferrum_ref.parity.subject import FunctionSubject
from ferrum_ref.parity.units import STORAGES

EXACT = {"write_kv", "embedding", "argmax"}


def honest_runs(operation_name: str, seeds: range) -> list[CaseResult]:
    """Every honest algorithm of one operation on every small case and dtype; expectations are shared between them."""
    operation = operation_named(operation_name)
    variants = [one for one in honest.HONEST if one.operation == operation_name]
    results = []
    for storage in STORAGES.values():
        for index in (index for index, case in enumerate(operation.cases) if case.small):
            for seed in seeds:
                inputs = draw_case(operation, storage, index, seed)
                expected = {one: operation.expect(inputs, one) for one in {one.algorithm for one in variants}}
                for one in variants:
                    with np.errstate(all="ignore"):
                        outputs = one.run(inputs)
                    subject = FunctionSubject(f"{one.name}", {})
                    results.append(judged(subject, operation, storage, index, seed, expected[one.algorithm], outputs))
    return results


def complaints(results: list[CaseResult]) -> str:
    return "\n".join("\n".join(failure_lines(result)) for result in results if result.status == FAILED)


@pytest.mark.clause("PA-GUARD-2", "PA-GUARD-5", "PA-SUBJECT-2")
def test_thousands_of_honest_runs_raise_no_false_alarm_and_the_bounds_are_tight() -> None:
    results = {operation.name: honest_runs(operation.name, range(1)) for operation in OPERATIONS}
    assert sum(len(found) for found in results.values()) >= 2000
    for name, found in results.items():
        assert not complaints(found), complaints(found)
        worst: dict[str, float] = defaultdict(float)
        for result in found:
            worst[result.dtype] = max(worst[result.dtype], result.ratio_det)
        if name not in EXACT:
            assert worst["fp32"] > 0.05, (name, worst)
            assert all(0.3 <= worst[dtype] <= 1.0 for dtype in ("fp16", "bf16")), (name, worst)


@pytest.mark.clause("PA-GUARD-5")
def test_every_operation_has_an_honest_algorithm_and_the_rich_ones_have_at_least_four() -> None:
    names = [one.operation for one in honest.HONEST]
    assert {operation.name for operation in OPERATIONS} == set(names)
    for name in ("rms_norm", "rms_norm_residual", "rotary_embedding", "attention", "paged_attention", "silu_mul"):
        assert names.count(name) >= 4
    for name in ("gelu", "linear", "matmul", "softmax", "layer_norm"):
        assert names.count(name) >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.clause("PA-GUARD-5")
@pytest.mark.parametrize("operation", [operation.name for operation in OPERATIONS])
def test_a_hundred_thousand_honest_runs_raise_no_false_alarm(operation: str) -> None:
    found = honest_runs(operation, range(100, 140))
    assert not complaints(found), complaints(found)
