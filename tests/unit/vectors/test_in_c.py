"""The set read, run and judged by a program in C99 with nothing but libc."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ferrum_ref.cli.main import main
from ferrum_ref.vectors.schema import Manifest

CC = shutil.which("cc")
STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
pytestmark = pytest.mark.skipif(CC is None, reason="no C compiler named cc on this machine")
SHOWN = ("--op", "rms_norm", "--op", "silu_mul", "--dtype", "fp32")


def built(repository: Path, folder: Path, *options: str) -> Path:
    program = folder / "vectors"
    sources = sorted((repository / "examples" / "vectors_in_c").glob("*.c"))
    command = [str(CC), *STRICT, *options, "-o", str(program), *map(str, sources), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return program


def run(program: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def honest(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(repository, tmp_path_factory.mktemp("c"))


@pytest.mark.clause("GV-PORT-1")
def test_a_program_in_c_passes_by_its_own_verdict_and_by_ours(
    honest: Path, vector_set: Path, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs.safetensors"
    done = run(honest, vector_set, outputs)
    assert (done.returncode, done.stderr) == (0, "")
    asked = [v.name for v in manifest.vectors if v.operation in ("rms_norm", "silu_mul") and v.storage == "fp32"]
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-1]] == [["pass", name] for name in asked]
    assert done.stdout.endswith(f"{len(asked)} of {len(asked)} vectors pass\n")
    assert main(["vectors", "check", str(vector_set), str(outputs), *SHOWN]) == 0
    ours = capsys.readouterr().out
    assert ours.splitlines()[-1] == f"{len(asked)} of {len(asked)} vectors pass"
    theirs = {line.split()[1]: line.split()[-1] for line in done.stdout.splitlines()[:-1]}
    assert {line.split()[1]: line.split()[-1] for line in ours.splitlines()[:-1]} == theirs  # the ratios, in digits


@pytest.mark.clause("GV-PORT-1", "GV-CHECK-5")
def test_eps_outside_the_root_is_found_by_both(
    repository: Path, vector_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs.safetensors"
    done = run(built(repository, tmp_path, "-DWRONG_EPS"), vector_set, outputs)
    assert done.returncode == 1
    theirs = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("fail")]
    assert {"rms_norm.fp32.2", "rms_norm.fp32.11"} <= set(theirs)
    assert main(["vectors", "check", str(vector_set), str(outputs), *SHOWN, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["vectors"]
    failed = {row["name"]: row for row in rows if row["status"] != "pass"}
    assert list(failed) == theirs
    assert all(name.startswith("rms_norm.") for name in failed)
    assert "eps decides" in failed["rms_norm.fp32.2"]["flags"]
    assert failed["rms_norm.fp32.2"]["ratio"] > 1e4


@pytest.mark.clause("GV-PORT-1")
def test_what_the_program_cannot_read_is_one_line(honest: Path, vector_set: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(vector_set, tmp_path / "set"))
    outputs = tmp_path / "outputs.safetensors"
    text = (copied / "manifest.json").read_text("ascii")

    def complaint() -> str:
        done = run(honest, copied, outputs)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        return line

    (copied / "manifest.json").write_text(text[:-3], "ascii")
    assert "is no manifest of golden vectors" in complaint()
    (copied / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'), "ascii")
    assert "has a version other than 1" in complaint()
    (copied / "manifest.json").write_text("[" * 2_000_000, "ascii")
    assert "is no manifest of golden vectors" in complaint()
    (copied / "manifest.json").write_text(text, "ascii")
    data = (copied / "silu_mul.safetensors").read_bytes()
    (copied / "silu_mul.safetensors").write_bytes(data[:-8])
    assert "has another size than the manifest gives" in complaint()
    (copied / "silu_mul.safetensors").write_bytes(data[:100])
    assert "its header reaches beyond its end" in complaint()
    (copied / "silu_mul.safetensors").unlink()
    assert "silu_mul.safetensors: cannot be opened" in complaint()
