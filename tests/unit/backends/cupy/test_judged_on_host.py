"""The judge's suite over the whole backend, its CUDA C running on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ferrum_ref.parity.ops.catalogue import OPERATIONS, operation_named
from ferrum_ref.parity.runner import PASSED, run_case
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.parity.units import STORAGES

QUICK_HEADS = (64, 80)  # a kernel of its own is compiled for each head size
WITH_HEADS = {"attention", "paged_attention"}


def head_size(case: Any) -> int | None:
    for name in ("D", "head_dim", "size"):
        if name in case.sizes:
            return int(case.sizes[name])
    return None


def chosen(name: str, every: bool) -> Iterator[int]:
    """Small cases; of attention only those of two head sizes unless `every`."""
    for index, case in enumerate(operation_named(name).cases):
        quick = name not in WITH_HEADS or head_size(case) in QUICK_HEADS
        if case.small and (every or quick):
            yield index


def judge(host: Any, name: str, dtype: str, every: bool) -> int:
    operation, storage = operation_named(name), STORAGES[dtype]
    subject = BackendSubject(host, "ferrum_cupy.host:make_backend")
    results = [run_case(subject, operation, storage, index, 0) for index in chosen(name, every)]
    faults = [f"{result.label}: {result.message}" for result in results if result.status != PASSED]
    assert not faults, "\n".join(faults[:5])
    return len(results)


@pytest.mark.clause(
    "BK-CUPY-3",
    "BK-CUPY-6",
    "BK-CUPY-7",
    "BK-CUPY-8",
    "BK-CUPY-9",
    "BK-CUPY-11",
    "BK-CUPY-14",
    "BK-CUPY-17",
    "BK-CUPY-47",
    "BK-CUPY-48",
    "BK-CUPY-50",
    "BK-CUPY-52",
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [op.name for op in OPERATIONS])
def test_an_operation_within_its_bound(host: Any, name: str, dtype: str) -> None:
    assert judge(host, name, dtype, every=False) > 0


@pytest.mark.slow
@pytest.mark.clause("BK-CUPY-3", "BK-CUPY-9")
@pytest.mark.parametrize("dtype", list(STORAGES))
@pytest.mark.parametrize("name", [op.name for op in OPERATIONS])
def test_every_small_case(host: Any, name: str, dtype: str) -> None:
    assert judge(host, name, dtype, every=True) > 0
