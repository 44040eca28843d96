"""`ferrum-ref parity` from the command line: what it prints, how it exits, and that a reproduction reproduces."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from ferrum_ref.cli.main import main

BROKEN_BACKEND = '''
"""The numpy backend with one bug: gate and up swapped in silu_mul."""

from ferrum_ref.interfaces.kernel_ops import ActivationOps
from ferrum_ref.numpy_backend import make_backend as make_numpy


class Swapped(ActivationOps):
    def __init__(self, honest):
        self.honest = honest

    def silu_mul(self, gate, up):
        return self.honest.silu_mul(up, gate)

    def gelu(self, input):
        return self.honest.gelu(input)


def make_backend(device="cpu"):
    backend = make_numpy(device)
    kernels = backend.kernel_ops()
    swapped = Swapped(kernels.activation_ops())
    kernels.activation_ops = lambda: swapped
    return backend
'''


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend with a bug, given as package.module:factory."""
    (tmp_path / "swapped_backend.py").write_text(BROKEN_BACKEND, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "swapped_backend:make_backend"


@pytest.mark.clause("PA-CLI-1", "PA-CLI-2", "PA-REPORT-1")
def test_a_healthy_backend_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", "numpy", "--small", "--op", "silu_mul", "--op", "argmax"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert any("silu_mul" in line and "passed" in line for line in lines)
    assert any("argmax" in line and line.count("exact") == 3 for line in lines)
    assert "0 failed, 0 unsupported, 0 skipped" in out
    assert err == ""


@pytest.mark.clause("PA-REPORT-3", "PA-CLI-2")
def test_a_failure_is_reproduced_by_the_line_that_it_prints(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", broken, "--small", "--op", "silu_mul", "--dtype", "bf16", "--seed", "3"]) == 1
    first = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(first) if line.startswith("FAILED silu_mul bf16 case"))
    line = next(line for line in first[start:] if line.startswith("  run it again: "))
    command = shlex.split(line.removeprefix("  run it again: "))
    assert command[0] == "ferrum-ref"
    assert command[-1] == "3"
    assert main(command[1:]) == 1
    again = capsys.readouterr().out.splitlines()
    told = first[start : first.index(line)]
    assert [one for one in again if one in told] == told
    assert "err/bound is" in told[1]
    assert any("expected" in one and "bound" in one for one in told[2:])


@pytest.mark.clause("PA-CLI-2")
def test_a_single_case_is_described_even_when_it_passes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parity", "--backend", "numpy", "--op", "attention", "--dtype", "bf16", "--case", "3", "--seed", "3"]
    assert main(arguments) == 0
    assert "PASSED attention bf16 case 3 seed 3: B=1 T=2 S=33 H=7 G=1 D=64" in capsys.readouterr().out


@pytest.mark.clause("PA-REPORT-4")
def test_json_is_complete_and_the_same_for_the_same_seed(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parity", "--backend", broken, "--small", "--op", "silu_mul", "--op", "gelu", "--seeds", "2", "--json"]
    assert main(arguments) == 1
    first = capsys.readouterr().out
    assert main(arguments) == 1
    assert capsys.readouterr().out == first
    document = json.loads(first)
    assert [(cell["operation"], cell["dtype"]) for cell in document["cells"]][:3] == [
        ("silu_mul", "fp32"),
        ("silu_mul", "fp16"),
        ("silu_mul", "bf16"),
    ]
    states = {cell["operation"]: cell["status"] for cell in document["cells"]}
    assert states == {"silu_mul": "failed", "gelu": "passed"}
    assert document["num_seeds"] == 2
    assert document["model"] is None


@pytest.mark.clause("PA-CLI-1", "PA-CLI-2", "PA-RUN-5")
def test_a_model_that_is_not_here_is_spoken_of_and_nothing_judged_is_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["parity", "--backend", "numpy", "--budget", "1e-9", "--cache-dir", str(tmp_path)]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "whole model left out" in err
    assert "ferrum-ref pull smollm2-135m" in err
    assert "0 passed, 0 failed, 0 unsupported" in out


@pytest.mark.clause("PA-CLI-3", "PA-CLI-4")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "abacus"], "abacus"),
        (["--backend", "numpy", "--op", "frobnicate"], "frobnicate"),
        (["--backend", "numpy", "--dtype", "fp7"], "fp7"),
        (["--backend", "numpy", "--case", "3"], "--op"),
        (["--backend", "numpy", "--op", "gelu", "--op", "silu", "--case", "3"], "--op"),
        (["--backend", "numpy", "--op", "gelu", "--case", "99"], "99"),
        (["--backend", "numpy", "--seeds", "0"], "seed"),
        (["--backend", "numpy", "--budget", "-1"], "budget"),
        (["--backend", "numpy", "--model", "no-such-model"], "no-such-model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_two(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.clause("PA-CLI-4", "PA-MODEL-3", "PA-MODEL-4", "PA-MODEL-5")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_the_real_model_stays_on_the_floor(
    backend: str, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "--backend", backend, "--model", str(smollm2_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cells"] == []
    assert document["model"]["status"] == "passed"
    assert document["model"]["greedy_prefix"] == document["model"]["generated_tokens"] == 16
    assert len(document["model"]["layers"]) == 30
