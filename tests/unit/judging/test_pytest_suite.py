"""The suite in someone else's repository: the example package's own tests, and what pytest sees of the plug-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "third_party_backend"


def run(*arguments: str, cwd: Path = EXAMPLE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.clause("PA-PYTEST-1", "PA-PYTEST-2", "PA-OPEN-3")
def test_the_example_packages_own_tests_pass() -> None:
    done = run("tests")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


@pytest.mark.clause("PA-PYTEST-2")
def test_without_a_backend_it_is_a_usage_error() -> None:
    done = run("--pyargs", "ferrum_ref.parity", "--op", "add", "--dtype", "fp32")
    assert done.returncode != 0
    assert "give --backend NAME" in done.stdout + done.stderr


@pytest.mark.clause("PA-PYTEST-1")
def test_waivers_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text('[[waiver]]\noperation = "rms_norm"\ndtype = "*"\nreason = "known"\nexpires = 2999-01-31\n')
    options = ["--backend", "third_party_kernels.parity_adapter:with_a_bug", "--op", "rms_norm", "--small"]
    done = run("--pyargs", "ferrum_ref.parity", *options, "--waivers", str(path), "--time-limit", "30", "--seeds", "2")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


@pytest.mark.clause("PA-PYTEST-3")
def test_other_runs_keep_their_own_options(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--backend', default='mine')\n"
        "    parser.addoption('--device')\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.option.backend == 'mine'\n"
        "    assert 'ferrum_ref.parity' not in sys.modules\n"
        "    assert 'ferrum_ref.judging.pytest_suite' not in sys.modules\n"
    )
    done = run("--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
