"""The GPU benchmark is tried where there is no GPU: the same script, small shapes, on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kernel_has_a_floor_and_a_time(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "sub" / "report.json"
    arguments = ("--device", "cpu", "--quick", "--backends", "torch,nowhere", "--rounds", "1", "--json", str(out))
    done = run(*arguments, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert "nowhere: " in done.stderr  # told, and left out
    report = json.loads(out.read_text())
    assert report["copy_bytes_per_s"] > 0
    assert report["matmul_operations_per_s"] > 0
    rows = {row["kernel"]: row for row in report["rows"]}
    assert len(rows) == 10
    assert not any(row["failed"] for row in rows.values())
    for row in rows.values():
        assert row["seconds"]["torch"] > 0
        assert row["share_of_floor"]["torch"] == pytest.approx(row["floor_s"] / row["seconds"]["torch"])
        assert row["host_seconds"]["torch"] > 0
        assert row["is_goal"] == (row["is_memory_bound"] and not row["kernel"].startswith("linear"))
    assert done.stdout.count("of copy ") == sum(row["is_goal"] for row in rows.values())
    assert rows["paged_attention, 4 x 256"]["bytes"] == 2 * 4 * 256 * 2 * 64 * (4 if dtype == "fp32" else 2)


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_the_gpu_check_needs_a_gpu(tmp_path: Path) -> None:
    """nvidia-smi is looked for on the PATH, which is empty here."""
    tool = SCRIPT.parents[1] / "tools" / "gpu_check.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--out", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "nvidia-smi finds no GPU here" in done.stderr
    assert not (tmp_path / "results").exists()


class Clock:
    """A device that stays busy for as long as it is told, and a host that needs a millisecond a call."""

    def __init__(self) -> None:
        self.now_s = self.idle_at_s = 0.0
        self.slept_s: list[float] = []

    def sleep(self, cycles: int) -> None:
        self.slept_s.append(cycles / 2.2e9)
        self.idle_at_s = max(self.idle_at_s, self.now_s) + self.slept_s[-1]

    def call(self) -> None:
        self.now_s += 1e-3
        self.idle_at_s = max(self.idle_at_s, self.now_s) + 1e-5

    def event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at_s=0.0)
        event.record = lambda: setattr(event, "at_s", max(self.idle_at_s, self.now_s))
        event.query = lambda: self.now_s >= event.at_s
        event.synchronize = lambda: setattr(self, "now_s", max(self.now_s, event.at_s))
        event.elapsed_time = lambda other: (other.at_s - event.at_s) * 1e3
        return event


def test_a_device_that_waited_is_kept_busy_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a millisecond that look like half of one: a time is the device's own as soon as it need not wait."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("gpu_kernels")
    clock, times = Clock(), module.Times(call_s=5e-4)
    cuda = SimpleNamespace(Event=clock.event, _sleep=clock.sleep, synchronize=lambda _: None)
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    card: Any = object.__new__(module.Card)
    card.is_cuda, card.device = True, "cuda"
    card._one_round(clock.call, 5, times)
    assert times.device_s == [pytest.approx(1e-5)]  # not the host's millisecond
    assert times.host_s == [pytest.approx(1e-3)]
    assert not times.is_starved
    assert clock.slept_s == pytest.approx([1.5 * 5 * 5e-4 + 1e-3, 5.0 * 5 * 5e-4 + 1e-3])
    card._one_round(clock.call, 5, times)
    assert len(clock.slept_s) == 3  # what was enough once is asked for at once
    hopeless = module.Times(call_s=1e-6)
    for _ in range(2):
        card._one_round(clock.call, 50, hopeless)
    assert hopeless.is_starved
    assert len(clock.slept_s) == 3 + 3 + 1  # and what never is, not again
    assert hopeless.device_s[0] == pytest.approx(1e-3, rel=0.1)
