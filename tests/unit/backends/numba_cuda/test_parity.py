"""The parity suite over the simulated backend: a sample of its small cases by default, all of them in the slow set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ferrum_numba.simulator import Schedule

from ferrum_ref.parity.ops.catalogue import OPERATIONS, operation_named
from ferrum_ref.parity.ops.operation import Operation
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import PASSED, draw_case, run_case
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.parity.units import STORAGES

DTYPES = tuple(STORAGES)
SAMPLES = 3  # cases of each operation by default, the dtypes taking turns
CHOSEN = {  # rising scores (6) move the maximum from tile to tile; casts and draws of thousands take long
    "attention": (1, 6, 10),
    "paged_attention": (1, 6, 9),
    "cast": (7, 8, 11),
    "sample_token": (12, 13),
    "decode_step": (4,),  # a step of the other cases takes seconds
}
FEW_DRAWS = 64  # of a token: more take a simulated GPU minutes
OFFERED = [operation.name for operation in OPERATIONS]


def subject(backend: Any) -> BackendSubject:
    return BackendSubject(backend, "numba-cuda", "simulator")


def small_cases(spec: Operation) -> list[int]:
    return [index for index, case in enumerate(spec.cases) if case.small and case.sizes.get("n", 0) <= FEW_DRAWS]


def check(result: Any) -> None:
    assert result.status == PASSED, "\n".join([result.message, *failure_lines(result)])


@pytest.mark.clause(
    "BK-NCUDA-6", "BK-NCUDA-7", "BK-NCUDA-8", "BK-NCUDA-14", "BK-NCUDA-16", "BK-NCUDA-19", "BK-NCUDA-21"
)
@pytest.mark.parametrize("operation", OFFERED)
def test_a_sample_of_cases_passes(backend: Any, operation: str) -> None:
    spec = operation_named(operation)
    for turn, index in enumerate(CHOSEN.get(operation, small_cases(spec)[:SAMPLES])):
        check(run_case(subject(backend), spec, STORAGES[DTYPES[turn % 3]], index, 0))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.clause(
    "BK-NCUDA-6", "BK-NCUDA-7", "BK-NCUDA-8", "BK-NCUDA-14", "BK-NCUDA-16", "BK-NCUDA-19", "BK-NCUDA-21"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OFFERED)
def test_every_small_case_passes(backend: Any, operation: str, dtype: str) -> None:
    spec = operation_named(operation)
    assert small_cases(spec)
    for index in small_cases(spec):
        check(run_case(subject(backend), spec, STORAGES[dtype], index, 0))


@pytest.mark.clause("BK-NCUDA-14", "BK-NCUDA-16")
@pytest.mark.parametrize(
    ("operation", "index", "sizes"),
    [
        ("linear", 0, {"gemv_rows": 0}),
        ("linear", 2, {"gemv_rows": 0}),
        ("linear", 12, {"gemv_rows": 0}),
        ("quantized_linear_q4_0", 0, {"gemv_rows": 0}),
        ("quantized_linear_q8_0", 1, {"gemv_rows": 0}),
        ("attention", 3, {"split_keys": 7}),
        ("attention", 10, {"split_keys": 5}),
        ("attention", 6, {"split_keys": 32}),
        ("paged_attention", 0, {"split_keys": 16}),
        ("paged_attention", 13, {"split_keys": 8}),
    ],
)
def test_the_other_kernel_for_the_same_sizes_passes_too(
    tuned: Any, operation: str, index: int, sizes: dict[str, int]
) -> None:
    storage = STORAGES["fp32" if index % 2 else "bf16"]
    check(run_case(subject(tuned(**sizes)), operation_named(operation), storage, index, 1))


@pytest.mark.clause("BK-CUDASIM-2", "BK-NCUDA-6")
@pytest.mark.parametrize(
    ("operation", "index", "sizes"),
    [
        ("rms_norm", 7, {}),
        ("layer_norm", 1, {}),
        ("softmax", 1, {}),
        ("linear", 0, {}),
        ("linear", 0, {"gemv_rows": 0}),
        ("quantized_linear_q4_0", 0, {}),
        ("attention", 0, {}),
        ("attention", 3, {"split_keys": 16}),
        ("paged_attention", 9, {}),
        ("argmax", 1, {}),
        ("rotary_embedding", 0, {}),
        ("write_kv", 1, {}),
        ("matmul", 0, {}),
    ],
)
def test_both_schedules_give_the_same_bits(tuned: Any, operation: str, index: int, sizes: dict[str, int]) -> None:
    spec = operation_named(operation)
    inputs = draw_case(spec, STORAGES["fp32"], index, 3)
    forwards = spec.call(tuned(Schedule.FORWARDS, **sizes), inputs)
    backwards = spec.call(tuned(Schedule.BACKWARDS, **sizes), inputs)
    for one, other in zip(forwards, backwards, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
