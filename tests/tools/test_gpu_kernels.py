"""The GPU benchmark is tried where there is no GPU: the same script, small shapes, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
