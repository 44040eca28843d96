"""docs/porting.md tells the truth: paths exist, modules import, prefixes have clauses, and its commands find tests."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERFACES = (
    "tensor", "tensor::utils", "memory", "backend", "kernel_ops", "decode_backend", "transformer", "model_builder",
    "model_executor", "kv_cache", "scheduler", "sampler", "tokenizer", "engine", "llm", "families",
)  # fmt: skip
TYPES = ("ids", "requests", "sampling", "config", "devices", "models", "metrics", "errors")
TRAITS = {
    "tensor": "TensorOps",
    "memory": "DeviceMemoryManager",
    "backend": "BackendRegistry",
    "weights": "WeightLoader",
    "kernel_ops": "KernelOps",
    "decode_backend": "DecodeBackend",
    "transformer": "TransformerWeights",
    "model_builder": "ModelBuilder",
    "model_executor": "ModelExecutor",
    "kv_cache": "KvCacheManager",
    "scheduler": "Scheduler",
    "sampler": "LogitsProcessor",
    "tokenizer": "Tokenizer",
    "engine": "InferenceEngine",
    "llm": "DecoderOnlyLLM",
    "families": "EmbeddingModel",
}


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "porting.md").read_text("utf-8")


@pytest.fixture(scope="module")
def rows(page: str) -> list[list[str]]:
    """The rows of the two tables of modules, as lists of cells."""
    tables = page[page.index("## The interfaces") : page.index("## How a Rust construct")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0] != "Rust module" and set(row[0]) != {"-"}]


def test_every_module_of_the_contract_has_a_row(rows: list[list[str]]) -> None:
    named = [name for row in rows for name in re.findall(r"`([a-z_:]+)`", row[0])]
    assert sorted(set(named)) == sorted({*INTERFACES, *TYPES})


def test_every_path_exists(page: str, repository: Path) -> None:
    paths = re.findall(r"`((?:ferrum_ref|specs|tests|docs|tools)/[^`]+)`", page)
    assert len(paths) > 50
    assert [path for path in paths if not (repository / path).exists()] == []


def test_every_python_module_has_the_contract(rows: list[list[str]]) -> None:
    for row in rows:
        module = importlib.import_module(row[1].strip("`"))
        name = module.__name__.rpartition(".")[2]
        if "interfaces" in module.__name__:
            assert inspect.isclass(getattr(module, TRAITS[name])), row[1]


def test_every_prefix_has_clauses_in_the_file_beside_it(rows: list[list[str]], repository: Path) -> None:
    for row in rows:
        clauses = re.findall(
            r"^\*\*([A-Z0-9-]+)\*\* ", (repository / row[2].strip("`")).read_text("utf-8"), re.MULTILINE
        )
        for prefix in row[3].split(", "):
            assert any(id_.startswith(f"{prefix}-") for id_ in clauses), (prefix, row[2])


def test_every_room_of_the_specs_that_states_a_contract_is_there(rows: list[list[str]], repository: Path) -> None:
    """The other rooms are this project's own: plug-ins, files, step loop, judge, simulator, verification and so on."""
    rooms = {prefix[:2] for row in rows for prefix in row[3].split(", ")}
    found = {
        id_
        for path in (repository / "specs").glob("*.md")
        for id_ in re.findall(r"^\*\*([A-Z]{2})-[A-Z0-9]+-\d+\*\* ", path.read_text("utf-8"), re.MULTILINE)
    }
    assert found - rooms <= {"MD", "QT", "ST", "PA", "SI", "TP", "VE", "GV"}


def test_the_commands_find_the_tests_of_their_clauses(page: str, repository: Path) -> None:
    commands = re.findall(r"tools/clause_tests\.py ([A-Z0-9 -]+)\)", page)
    assert commands == ["DB", "DB-STEP", "DB-STEP-1 TW-ROPE-1", "D-24"]
    room = found_by(repository, commands[0])
    assert room > found_by(repository, commands[1])
    assert all(test.startswith("tests/unit/") for test in room)


def test_a_defect_stands_for_the_clauses_that_name_it(repository: Path) -> None:
    """D-24, the acceptance rule that upstream leaves open, is told in the clauses of speculative execution."""
    listed = dict(line.split(": ", 1) for line in run(repository, "--defects").stdout.splitlines())
    assert {"MX-SPEC-2", "MX-SPEC-3"} <= set(listed["D-24"].partition(" (")[0].split(", "))
    assert found_by(repository, "MX-SPEC-2") <= found_by(repository, "D-24")
    assert run(repository, "D-99").stderr == "no test names a clause D-99\n"


def test_every_listed_defect_has_tests(repository: Path) -> None:
    counts = [int(line.rpartition("(")[2].split()[0]) for line in run(repository, "--defects").stdout.splitlines()]
    assert len(counts) >= 80
    assert all(counts)


def test_several_beginnings_join_and_one_without_tests_is_told(repository: Path) -> None:
    done = run(repository, "DB-STE XX DB-STEP-99 DB-STEP-1 TW-ROPE-1")
    assert done.returncode == 1
    assert done.stderr == "".join(f"no test names a clause {wanted}\n" for wanted in ("DB-STE", "XX", "DB-STEP-99"))
    files = {test.partition("::")[0] for test in done.stdout.split()}
    assert files >= {
        "tests/unit/executor/decode_backend/test_logits.py",
        "tests/unit/models/test_transformer_weights.py",
    }
    assert all("decode" in file or "transformer_weights" in file for file in files)
    assert "test_the_rotary_tables_are_transformers" in done.stdout


def found_by(repository: Path, clauses: str) -> set[str]:
    done = run(repository, clauses)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def run(repository: Path, clauses: str) -> subprocess.CompletedProcess[str]:
    tool = repository / "tools" / "clause_tests.py"
    return subprocess.run([sys.executable, tool, *clauses.split()], capture_output=True, text=True, check=False)
