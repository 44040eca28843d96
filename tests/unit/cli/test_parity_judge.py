"""`ferrum-ref parity --mutants` and `--invariance` from the command line."""

from __future__ import annotations

import json

import pytest

from ferrum_ref.cli import parity_mutants
from ferrum_ref.cli.main import main
from ferrum_ref.parity.mutants.matrix import OURS, SUITES, MatrixRow


def rows(survivors: int) -> list[MatrixRow]:
    made = []
    for index in range(50):
        row = MatrixRow("norm" if index else "tokenizer", "rms_norm" if index else "-", f"bug {index}")
        row.count({OURS} if index >= survivors else (), "fp32" if index else "-", 0)
        made.append(row)
    return made


@pytest.mark.clause("PA-MUTANT-5")
@pytest.mark.parametrize(("survivors", "code"), [(0, 0), (1, 0), (2, 1)])
def test_two_of_fifty_survivors_are_too_many(
    survivors: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity_mutants, "_matrix", lambda seeds, notes: rows(survivors))
    assert main(["parity", "--mutants"]) == code
    out = capsys.readouterr().out
    for part in (
        "bug 49",
        "torch",
        "ONNX",
        "attn fixed",
        "attn similar",
        "mutants killed in every dtype on every seed",
    ):
        assert part in out
    assert ("survives: rms_norm bug 1" in out) is (survivors > 1)
    assert main(["parity", "--mutants", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["worst_seed"] == pytest.approx(1 - survivors / 50)
    assert set(document["mutants"][1]["killed"]) == set(SUITES)
    assert set(document["mutants"][0]["killed"]) == {OURS}


@pytest.mark.clause("PA-CLI-3", "PA-MUTANT-5")
@pytest.mark.parametrize("arguments", [[], ["--mutants", "--backend", "numpy"]], ids=["neither", "both"])
def test_a_backend_or_the_mutants(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *arguments]) == 2
    assert "either --backend NAME or --mutants" in capsys.readouterr().err


@pytest.mark.clause("PA-INVARIANT-3")
def test_invariance_is_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", "numpy", "--invariance", "--op", "silu_mul"]) == 0
    assert capsys.readouterr().out.count("│ same bits") == 6
    assert main(["parity", "--backend", "numpy", "--invariance", "--op", "linear", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["repeated"] for one in found] == ["same bits"] * 3
    assert {one["alone"] for one in found} <= {"same bits", "within bounds"}
