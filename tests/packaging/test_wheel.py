"""The wheel built from this tree, in an environment that holds nothing but its core dependencies."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"),
        *("--no-build-isolation", "--wheel-dir", folder, repository),
        cwd=folder,
    )
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin folder of a fresh environment with the wheel and its core dependencies only."""
    folder = tmp_path_factory.mktemp("bare")
    assert run(sys.executable, "-m", "venv", folder / "env", cwd=folder).returncode == 0
    python = folder / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    installed = run(*pip, "-c", repository / "constraints.txt", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return python.parent


def test_the_wheel_holds_the_three_packages_and_no_shelf(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {"ferrum_ref", "ferrum_torch", "ferrum_sim"} <= tops
    assert not tops & {"backends", "simulator", "tests", "benchmarks", "specs"}


def test_typing_markers_are_shipped(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ferrum_ref/py.typed", "ferrum_torch/py.typed", "ferrum_sim/py.typed"} <= set(names)


def test_import_and_version_from_a_bare_environment(bare: Path, tmp_path: Path) -> None:
    code = "import ferrum_ref, sys; print(ferrum_ref.__version__, 'torch' in sys.modules)"
    done = run(bare / "python", "-W", "error", "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("0.1.0 False\n", "")
    assert run(bare / "ferrum-ref", "--version", cwd=tmp_path).stdout == "ferrum-ref 0.1.0\n"


@pytest.mark.model
def test_a_bare_environment_answers_a_question(bare: Path, smollm2_path: Path, tmp_path: Path) -> None:
    done = run(
        *(bare / "ferrum-ref", "generate", smollm2_path, "What is the capital of France?"),
        *("--chat", "--temperature", "0", "--max-tokens", "16"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.model
@pytest.mark.clause("EN-CLI-2")
def test_absent_torch_is_one_clear_line(bare: Path, smollm2_path: Path, tmp_path: Path) -> None:
    done = run(bare / "ferrum-ref", "generate", smollm2_path, "Hi", "--backend", "torch", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ferrum-ref: error: ")
    assert "torch" in line
    assert "pip install" in line


@pytest.mark.clause("EN-CLI-2")
def test_absent_simpy_is_one_clear_line(bare: Path, tmp_path: Path) -> None:
    done = run(
        *(bare / "ferrum-sim", "run", "--arrivals", "poisson:1", "--model", "llama-3-8b", "--hardware", "h100"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ferrum-sim: error: ")
    assert "pip install" in line
