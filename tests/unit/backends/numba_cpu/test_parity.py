"""The judge's cases on this backend: every operation, every type, nothing unsupported; and what it declares."""

from __future__ import annotations

from typing import Any

import pytest

from ferrum_ref.parity.cells import gather
from ferrum_ref.parity.ops.catalogue import OPERATIONS
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import PASSED, Selection, run
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.types.algorithm import Algorithm


@pytest.mark.clause("BK-NCPU-17", "BK-NCPU-8", "BK-NCPU-10", "BK-NCPU-12", "BK-NCPU-13", "BK-NCPU-15", "BK-NCPU-18")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_operation_passes(backend: Any, dtype: str) -> None:
    subject = BackendSubject(backend, "ferrum_numba.cpu:make_backend")
    cells = gather(run(subject, Selection(dtypes=[dtype], only_small=True)))
    assert [cell.operation for cell in cells] == [operation.name for operation in OPERATIONS]
    failures = [line for cell in cells for failure in cell.failures for line in failure_lines(failure)]
    assert not failures, "\n".join(failures)
    assert {cell.operation for cell in cells if cell.counts[PASSED] < cell.num_cases} == set()


@pytest.mark.clause("BK-NCPU-17")
def test_declared_algorithms(kernels: Any) -> None:
    for name in ("rms_norm", "softmax", "silu_mul", "linear", "quantized_linear", "matmul", "add"):
        assert kernels.declared_algorithm(name) == Algorithm(exp_ulp=1.5)
    for name in ("attention", "paged_attention"):
        declared = kernels.declared_algorithm(name)
        assert declared == Algorithm(exp_ulp=1.5, key_block=512)
        assert not declared.rounds_probabilities
    for name in ("gelu", "gelu_tanh", "sample_token"):
        assert kernels.declared_algorithm(name).accumulate == "fp64"
