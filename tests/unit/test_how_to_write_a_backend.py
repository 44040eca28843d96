"""docs/how-to-write-a-backend.md tells the truth: its program is loaded and judged, and its bug is found."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferrum_ref.parity.runner import FAILED, PASSED, UNSUPPORTED, CaseResult, Selection, run
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.plugins import load_backend

OPERATIONS = ("rms_norm", "rms_norm_residual", "linear")


@pytest.fixture
def program(repository: Path) -> str:
    page = (repository / "docs" / "how-to-write-a-backend.md").read_text("utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class MyBackend" in block)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_backend", None)


def judged(folder: Path, program: str, *operations: str) -> list[CaseResult]:
    (folder / "my_backend.py").write_text(program)
    target = "my_backend:make_backend"
    return list(run(BackendSubject(load_backend(target), target), Selection(operations, only_small=True), None))


@pytest.mark.clause("BK-PLUGIN-3")
def test_the_first_kernel_passes_and_the_rest_is_unsupported(folder: Path, program: str) -> None:
    status = {(result.operation, result.status) for result in judged(folder, program, *OPERATIONS)}
    assert status == {("rms_norm", PASSED), ("rms_norm_residual", PASSED), ("linear", UNSUPPORTED)}


@pytest.mark.clause("BK-PLUGIN-3")
def test_eps_outside_the_root_fails(folder: Path, program: str) -> None:
    honest = "np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))"
    assert honest in program
    broken = program.replace(honest, "(np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True)) + np.float32(eps))")
    results = judged(folder, broken, "rms_norm")
    assert {result.dtype for result in results if result.status == FAILED} == {"fp32", "fp16", "bf16"}
    case_2 = next(result for result in results if result.dtype == "fp32" and result.case_index == 2)
    assert case_2.reproduce.endswith("--backend my_backend:make_backend --op rms_norm --dtype fp32 --case 2 --seed 0")


@pytest.mark.clause("BK-PLUGIN-3")
def test_an_undeclared_rounding_fails_in_16_bits(folder: Path, program: str) -> None:
    declared = 'Algorithm(rounds_residual=op == "rms_norm_residual")'
    assert declared in program
    results = judged(folder, program.replace(declared, "Algorithm()"), "rms_norm_residual")
    assert {result.dtype for result in results if result.status == FAILED} == {"fp16", "bf16"}
