"""Resident memory of loading, measured by the benchmark's worker in processes of its own.

Bounds are the promise: what is mapped is not copied, pages that were read once are given back.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ferrum_ref.formats.mapped import release_pages

BENCHMARK = Path(__file__).parents[4] / "benchmarks" / "load_memory.py"
MB = 10**6
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def worker(model: str, how: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), model, "--worker", how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write(directory: Path, num_shards: int, num_bytes: int, hidden: int) -> None:
    spec = importlib.util.spec_from_file_location("load_memory", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_checkpoint(directory, num_shards, num_bytes // num_shards, hidden)


@pytest.mark.clause("MD-PACK-5")
def test_a_sharded_checkpoint_is_mapped_not_copied(tmp_path: Path) -> None:
    """12 files, 50 MB: packed, nothing is copied; dense in the stored type, one copy and no pages beside it."""
    write(tmp_path, 12, 50 * MB, 256)
    packed, dense = worker(str(tmp_path), "packed"), worker(str(tmp_path), "dense")
    size = packed["file_bytes"]
    assert size > 45 * MB
    assert packed["weights_bytes"] == dense["weights_bytes"] <= size
    assert packed["load"]["growth_bytes"] < 0.5 * size
    anonymous = packed["forward"]["anonymous_bytes"] - packed["before"]["anonymous_bytes"]
    assert anonymous < 0.4 * size
    assert packed["forward"]["growth_bytes"] < size + 30 * MB
    assert dense["load"]["growth_bytes"] < 1.5 * size


@pytest.mark.slow
@pytest.mark.clause("MD-PACK-5")
def test_two_gigabytes_in_twelve_shards_load_within_300_mb_over_their_size(tmp_path: Path) -> None:
    write(tmp_path, 12, 2050 * MB, 1024)
    for how in ("open", "packed", "dense"):
        found = worker(str(tmp_path), how)
        assert found["file_bytes"] > 2000 * MB
        for step in ("load", "forward"):
            if step in found:
                assert found[step]["peak_bytes"] < found["file_bytes"] + 300 * MB, (how, step)


@pytest.mark.slow
@pytest.mark.clause("MD-PACK-5")
def test_smollm2_loads_for_packed_execution_below_1_3_times_its_file() -> None:
    """The whole process, interpreter included; and running it adds no copy."""
    found = worker("smollm2-135m", "packed")
    size = found["file_bytes"]
    assert found["load"]["peak_bytes"] < 1.3 * size
    assert found["forward"]["anonymous_bytes"] - found["before"]["anonymous_bytes"] < 0.5 * size


@pytest.mark.clause("MD-PACK-5")
def test_bytes_that_are_not_mapped_have_no_pages_to_release() -> None:
    release_pages(b"x" * 100_000, 0, 100_000)
