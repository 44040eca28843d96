"""`make gpu-check` where there is no GPU: stages that fail, hang or say nothing do not hide each other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"
CELL = {"operation": "rms_norm", "dtype": "fp32", "failures": []}


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check_under_test", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def parity(**counts: int) -> str:
    return f"print({json.dumps(json.dumps({'cells': [{**CELL, 'cases': counts}]}))})"


def test_each_stage_ends_as_it_did_and_the_summary_says_so(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(tool.LIMITS_S, "parity", 20.0)
    check = tool.Check(tmp_path, "Some Card 80GB", time.monotonic() + 600.0)
    ends = {
        "passed": parity(passed=7, unsupported=2),
        "failed": f"{parity(passed=7, failed=1)}; raise SystemExit(1)",
        "unfinished": parity(passed=7, skipped=3),
        "left out": "import sys; print('error: Unsupported operation: no such GPU', file=sys.stderr); sys.exit(2)",
    }
    for status, text in ends.items():
        assert check.run(tool.Stage("parity", status.replace(" ", "-"), program(text))).status == status
    crashed = tool.Stage("parity", "crashed", program("import os; os.abort()"))
    assert check.run(crashed).status == "failed"
    refused = tool.Stage("parity", "refused", program("print('out of memory'); raise SystemExit(2)"))
    assert check.run(refused).status == "failed"  # not one that says that it is unavailable
    mute = tool.Stage("parity", "mute", program("print('no JSON')"))
    assert check.run(mute).status == "failed"
    summary = json.loads((tmp_path / f"{check.stem}_summary.json").read_text())
    assert "some_card_80gb" in check.stem
    assert [stage["status"] for stage in summary["stages"]] == [*ends, "failed", "failed", "failed"]
    assert summary["exit_code"] == check.exit_code() == 1
    assert (tmp_path / f"{check.stem}_parity_passed.json").exists()


def test_a_stage_that_hangs_is_stopped_with_its_children(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(tool.LIMITS_S, "model", 6.0)
    check = tool.Check(tmp_path, "card", time.monotonic() + 600.0)
    mark = tmp_path / "child"
    text = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    real = tool.finished
    monkeypatch.setattr(tool, "finished", lambda command, _: real(command, 1.5))
    found = check.run(tool.Stage("model", "cupy", program(text)))
    assert (found.status, check.exit_code()) == ("timed out", 1)
    state = Path(f"/proc/{mark.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"  # ended, if nobody has asked for it yet


def test_without_time_left_nothing_is_started_and_that_is_no_success(tool: Any, tmp_path: Path) -> None:
    check = tool.Check(tmp_path, "card", time.monotonic() + 1.0)
    assert check.run(tool.Stage("parity", "cupy", program("raise SystemExit(0)"))).status == "unfinished"
    assert check.exit_code() == 1
    assert tool.Check(tmp_path, "card", 0.0).exit_code() == 2


@pytest.mark.slow
def test_the_whole_of_it_on_the_cpu(tmp_path: Path) -> None:
    options = ["--card", "none", "--device", "cpu", "--quick", "--backends", "torch,cupy", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity cupy: left out" in done.stdout
    (summary,) = tmp_path.glob("*_none_summary.json")
    statuses = {(s["kind"], s["backend"]): s["status"] for s in json.loads(summary.read_text())["stages"]}
    assert statuses[("parity", "torch")] == statuses[("kernels", "torch")] == "passed"


def test_the_random_model_is_judged(tmp_path: Path) -> None:
    """What takes the real model's place where its file is not to be had."""
    program = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import gpu_model\n"
        "from ferrum_ref.plugins import load_backend\n"
        "print(gpu_model.judge_random(load_backend('numpy', 'cpu')).passed)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
