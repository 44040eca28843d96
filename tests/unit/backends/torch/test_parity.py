"""The judge's cases on this backend: every operation, every type, nothing unsupported."""

from __future__ import annotations

from typing import Any

import pytest

from ferrum_ref.parity.cells import gather
from ferrum_ref.parity.ops.catalogue import OPERATIONS
from ferrum_ref.parity.report import failure_lines
from ferrum_ref.parity.runner import PASSED, Selection, run
from ferrum_ref.parity.subject import BackendSubject


@pytest.mark.clause("BK-TORCH-26", "BK-TORCH-38", "BK-TORCH-8", "BK-TORCH-12", "BK-TORCH-13", "BK-TORCH-16")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_operation_passes(backend: Any, dtype: str) -> None:
    cells = gather(run(BackendSubject(backend, "torch"), Selection(dtypes=[dtype], only_small=True)))
    assert [cell.operation for cell in cells] == [operation.name for operation in OPERATIONS]
    failures = [line for cell in cells for failure in cell.failures for line in failure_lines(failure)]
    assert not failures, "\n".join(failures)
    assert {cell.operation for cell in cells if cell.counts[PASSED] < cell.num_cases} == set()


@pytest.mark.clause("BK-TORCH-38")
def test_the_decode_backend_that_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from ferrum_torch import backend as module
    from ferrum_torch import fusing, make_backend, make_compiled_backend

    from ferrum_ref.errors import BackendError

    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "TorchDecodeBackend", lambda *arguments: made.append(arguments))
    monkeypatch.setattr("ferrum_torch.runtime.compiled_on", lambda device: fusing.Compiled())
    plain: Any = make_backend()
    compiled: Any = make_compiled_backend()
    for backend, options in ((plain, {}), (compiled, {}), (compiled, {"mode": "eager"}), (plain, {"max_tokens": 9})):
        backend.make_decode_backend("weights", **options)
    assert made == [
        ("weights", "eager", None),
        ("weights", "compiled", None),
        ("weights", "eager", None),
        ("weights", "eager", 9),
    ]
    asyncio.run(plain.shutdown())
    with pytest.raises(BackendError, match="shut down"):
        plain.make_decode_backend("weights")
