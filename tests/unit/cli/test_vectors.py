"""`ferrum-ref vectors`: write, check and list as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.cli.main import main
from ferrum_ref.formats.elements import ELEMENTS
from ferrum_ref.formats.safetensors import SafetensorsFile
from ferrum_ref.vectors.arrays import encode, read_tensor
from ferrum_ref.vectors.read import read_manifest

NAME = "gelu.fp32.3"


@pytest.fixture
def vector_set(tmp_path: Path) -> Path:
    """A small set of its own: gelu and argmax."""
    directory = tmp_path / "set"
    assert main(["vectors", "write", str(directory), "--op", "gelu", "--op", "argmax"]) == 0
    return directory


def rounded_once(directory: Path) -> dict[str, Any]:
    """The right results, each rounded once to its type."""
    manifest = read_manifest(directory)
    found = {}
    for vector in manifest.vectors:
        file = SafetensorsFile(directory / manifest.operations[vector.operation].file)
        for output in vector.outputs:
            value = read_tensor(file, vector.value_tensor(output.name))
            found[vector.submitted_tensor(output.name)] = value.astype(ELEMENTS[output.dtype])
        file.close()
    return found


def submitted(directory: Path, outputs: dict[str, Any]) -> str:
    path = directory.with_name("outputs.safetensors")
    path.write_bytes(encode(outputs))
    return str(path)


@pytest.mark.clause("GV-WRITE-1")
def test_write_says_where_and_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "a" / "set"
    assert main(["vectors", "write", str(directory), "--op", "argmax", "--dtype", "fp32"]) == 0
    captured = capsys.readouterr()
    num_bytes = sum(path.stat().st_size for path in directory.iterdir())
    assert captured.out == f"{directory}: 8 vectors of 1 operations, {num_bytes} bytes\n"
    assert captured.err == ""


@pytest.mark.clause("GV-CHECK-1", "GV-CHECK-5", "GV-CHECK-6")
def test_check_passes_what_is_right(vector_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = submitted(vector_set, {**rounded_once(vector_set), "spare": np.zeros(2)})
    capsys.readouterr()
    assert main(["vectors", "check", str(vector_set), outputs]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert len(lines) == len(read_manifest(vector_set).vectors) + 2
    assert all(line.startswith("pass  ") for line in lines[:-2])
    assert lines[-2] == f"{len(lines) - 2} of {len(lines) - 2} vectors pass"
    assert lines[-1] == "note: 1 tensors that no vector of the set asks for: spare"
    assert any(line.split() == ["pass", "argmax.fp32.0", "exact"] for line in lines)


@pytest.mark.clause("GV-CHECK-2", "GV-CHECK-4", "GV-CHECK-5")
def test_check_names_what_is_wrong_and_why_it_is_there(vector_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = rounded_once(vector_set)
    outputs[f"{NAME}/y"] = outputs[f"{NAME}/y"] * np.float32(1.0 + 1e-4)
    del outputs["argmax.fp32.0/index"]
    path = submitted(vector_set, outputs)
    capsys.readouterr()
    assert main(["vectors", "check", str(vector_set), path]) == 1
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith(f"fail         {NAME} "))
    assert lines[place + 1].startswith("    y[")
    assert "got / expected is 1.0001 in all of them" in lines[place + 1]
    assert lines[place + 2] == "    why it exists: around zero; KN-GELU-1"
    missing = lines.index("missing      argmax.fp32.0")
    assert lines[missing + 1] == "    the file has no tensor 'argmax.fp32.0/index'"
    assert lines[missing + 2].startswith("    why it exists: ties, D-03; ")
    assert lines[-1].endswith("vectors pass: 1 fail, 1 missing")


@pytest.mark.clause("GV-CHECK-7", "GV-CHECK-5")
def test_json_holds_the_same(vector_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = rounded_once(vector_set)
    del outputs["argmax.fp32.0/index"]
    path = submitted(vector_set, outputs)
    capsys.readouterr()
    assert main(["vectors", "check", str(vector_set), path, "--json", "--op", "argmax", "--dtype", "fp32"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("passed", "num_vectors", "num_passed", "unexpected")} == {
        "passed": False,
        "num_vectors": 8,
        "num_passed": 7,
        "unexpected": [],
    }
    assert found["vectors"][0] == {
        "name": "argmax.fp32.0",
        "operation": "argmax",
        "storage": "fp32",
        "status": "missing",
        "ratio": None,
        "messages": ["the file has no tensor 'argmax.fp32.0/index'"],
        "flags": ["ties", "D-03"],
        "clauses": ["KN-ARGMAX-1"],
    }
    assert found["vectors"][1]["status"] == "pass"
    assert found["vectors"][1]["ratio"] == 0.0


@pytest.mark.clause("GV-CHECK-7")
def test_list_shows_meaning_inputs_and_flags(vector_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["vectors", "list", str(vector_set), "--op", "argmax", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "argmax: index of the first maximum of logits (V,) or (1, V)",
        "  argmax.bf16.0   logits [40]     ties, D-03",
        "  argmax.bf16.6   logits [70]     neighbours, one unit in the last place",
        "  argmax.bf16.13  logits [1, 50]  infinities, D-03",
    ]
    assert main(["vectors", "list", str(vector_set), "--json", "--op", "gelu"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["operation"] for row in rows} == {"gelu"}
    assert set(rows[0]) == {"name", "operation", "storage", "flags", "clauses"}


@pytest.mark.clause("GV-CHECK-1", "GV-FORMAT-2", "GV-FORMAT-4", "GV-WRITE-2")
def test_bad_input_is_one_line_and_exit_code_2(vector_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = submitted(vector_set, rounded_once(vector_set))
    data = (vector_set / "gelu.safetensors").read_bytes()
    (vector_set / "gelu.safetensors").write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    for arguments, told in (
        (["check", str(vector_set), outputs], "gelu.safetensors: got "),
        (["check", str(vector_set.parent), outputs], "manifest.json: no such file"),
        (["check", str(vector_set), f"{outputs}.gone", "--op", "argmax"], "no such file"),
        (["check", str(vector_set), str(vector_set / "manifest.json"), "--op", "argmax"], "manifest.json: header"),
        (["check", str(vector_set), outputs, "--op", "softmax"], "operation 'softmax'"),
        (["list", str(vector_set), "--dtype", "int3"], "dtype 'int3'"),
        (["write", outputs], "File exists"),
        (["write", str(vector_set), "--op", "nothing"], "operation 'nothing' has none"),
    ):
        assert main(["vectors", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("ferrum-ref: error: ")
        assert told in line
    with pytest.raises(SystemExit) as raised:
        main(["vectors"])
    assert raised.value.code == 2
