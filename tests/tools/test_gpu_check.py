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


def test_a_backends_own_tests_end_as_pytest_does(tool: Any, tmp_path: Path) -> None:
    check = tool.Check(tmp_path, "card", time.monotonic() + 600.0)
    ends = {
        "passed": "print('9 passed')",
        "failed": "print('FAILED test_gpu.py::test_a_graph'); raise SystemExit(1)",
        "left out": "import sys; print('No module named pytest', file=sys.stderr); sys.exit(1)",
    }
    for status, text in ends.items():
        stage = check.run(tool.Stage("tests", "cupy", program(text)))
        assert stage.status == status
    assert "test_a_graph" in check.stages[1].message
    assert all((tool.ROOT / path).is_file() for path in tool.TESTS.values())


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


def test_goals_are_told_for_each_kernel_and_type(tool: Any) -> None:
    """One backend that reaches the bandwidth is enough; one that falls behind torch is too many."""

    def stage(backend: str, dtype: str, *rows: tuple[str, float, float | None, bool]) -> Any:
        told = [
            {
                "kernel": kernel,
                "is_goal": is_goal,
                "share_of_floor": {"torch's own": 0.99, backend: share},
                "times_torch": {} if ratio is None else {backend: ratio},
                "starved": [] if ratio != 1.26 else [backend, "torch's own"],
            }
            for kernel, share, ratio, is_goal in rows
        ]
        return tool.Stage("kernels", backend, [], dtype, document={"rows": told})

    stages = [
        tool.Stage("parity", "cupy", [], "bf16", document={"cells": []}),
        stage("cupy", "bf16", ("rms_norm", 0.71, 1.0, True), ("q4_0", 0.5, None, True), ("linear", 0.2, 9.0, False)),
        stage("torch", "bf16", ("rms_norm", 0.6, 1.26, True), ("q4_0", 0.69, None, True)),
        stage("cupy", "fp32", ("rms_norm", 0.7, 1.25, True)),
        tool.Stage("kernels", "numba-cuda", [], "fp32"),  # stopped before its first kernel
    ]
    found = {(goal["kernel"], goal["dtype"]): goal for goal in tool.goals(stages)}
    assert list(found) == [("rms_norm", "bf16"), ("q4_0", "bf16"), ("rms_norm", "fp32")]
    verdicts = {key: (goal["reaches_bandwidth"], goal["keeps_up_with_torch"]) for key, goal in found.items()}
    assert list(verdicts.values()) == [(True, False), (False, True), (True, True)]
    assert (
        "cupy 71% of copy bandwidth, 70% MET; BEHIND torch: torch 1.26; the host has its part in the time of torch"
        in found[("rms_norm", "bf16")]["words"]
    )
    assert "torch 69% of copy bandwidth, 70% MISSED; torch has none" in found[("q4_0", "bf16")]["words"]


@pytest.mark.slow
def test_the_whole_of_it_on_the_cpu(tool: Any, tmp_path: Path) -> None:
    options = ["--card", "none", "--device", "cpu", "--quick", "--backends", "torch,cupy", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity cupy bf16: left out" in done.stdout
    (summary,) = tmp_path.glob("*_none_summary.json")
    told = json.loads(summary.read_text())
    statuses = {(s["kind"], s["backend"], s["dtype"]): s["status"] for s in told["stages"]}
    assert [key for key in statuses if key[1] == "cupy"] == [("parity", "cupy", "bf16")]
    passed = [("parity", "torch", dtype) for dtype in tool.JUDGED_DTYPES]
    passed += [("kernels", "torch", dtype) for dtype in tool.DTYPES]
    assert [statuses[key] for key in passed] == ["passed"] * 5
    assert {goal["dtype"] for goal in told["goals"]} <= set(tool.DTYPES)


def test_the_random_model_is_judged(tmp_path: Path) -> None:
    """What takes the real model's place where its file is not to be had."""
    program = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import gpu_model\n"
        "from ferrum_ref.plugins import load_backend\n"
        "print(gpu_model.judge_random(load_backend('numpy', 'cpu')).passed)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
