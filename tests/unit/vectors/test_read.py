"""A manifest is read without trust: each way of being no manifest is one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ferrum_ref.errors import InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.vectors.arrays import encode
from ferrum_ref.vectors.read import read_manifest
from ferrum_ref.vectors.schema import Manifest
from ferrum_ref.vectors.verify import check_outputs
from ferrum_ref.vectors.write import write_vectors

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def copied(vector_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vector_set, tmp_path / "set"))


def edited(directory: Path, edit: Edit) -> Path:
    path = directory / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    edit(document)
    path.write_text(json.dumps(document), "utf-8")
    return directory


@pytest.mark.clause("GV-FORMAT-1")
def test_what_is_written_is_read_back(vector_set: Path, manifest: Manifest, copied: Path) -> None:
    text = (vector_set / "manifest.json").read_text("ascii")
    assert manifest.as_text() == text
    assert json.loads(text) == json.loads(json.dumps(manifest.as_json()))
    document = json.loads(text)
    assert document["format"] == "ferrum-golden-vectors"
    assert document["version"] == 1
    assert set(document) == {"format", "version", "algorithm", "operations", "vectors"}
    (norm,) = (row for row in document["vectors"] if row["name"] == "rms_norm.fp32.2")
    assert norm == {
        "name": "rms_norm.fp32.2",
        "operation": "rms_norm",
        "storage": "fp32",
        "flags": ["near sqrt(eps)", "eps decides"],
        "clauses": ["KN-RMSNORM-1", "KN-RMSNORM-2"],
        "parameters": {"eps": 1e-05},
        "inputs": [{"name": "x", "dtype": "F32", "shape": [4, 33]}, {"name": "weight", "dtype": "F32", "shape": [33]}],
        "outputs": [{"name": "y", "dtype": "F32", "shape": [4, 33], "axes": ["row", "feature"], "exact": False}],
        "origin": "ferrum-ref parity --op rms_norm --dtype fp32 --case 2 --seed 0",
    }


@pytest.mark.clause("GV-FORMAT-2")
@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda d: d.pop("format"), r"manifest\.json: format: got None, expected 'ferrum-golden-vectors'"),
        (lambda d: d.update(version="1"), r"version: got '1', expected a JSON value of type int"),
        (lambda d: d.update(version=True), r"version: got True"),
        (lambda d: d.update(vectors={}), r"vectors: got \{\}, expected a JSON value of type list"),
        (lambda d: d["vectors"].insert(3, "text"), r"vectors\[3\]: got 'text', expected an object"),
        (lambda d: d["vectors"].append(d["vectors"][0]), r"vectors: got 'rms_norm\.fp32\.1', expected every name once"),
        (lambda d: d["vectors"][2].update(operation="nrom"), r"vectors\[2\]\.operation: got 'nrom'"),
        (lambda d: d["vectors"][2].update(flags=[1]), r"vectors\[2\]\.flags: got \[1\], expected a list of texts"),
        (lambda d: d["vectors"][2].update(outputs=[]), r"vectors\[2\]\.outputs: got \[\], expected at least one"),
        (
            lambda d: d["vectors"][2]["inputs"][0].update(dtype="float"),
            r"inputs\[0\]\.dtype: got 'float', expected one",
        ),
        (lambda d: d["vectors"][2]["inputs"][0].update(shape=[-1]), r"inputs\[0\]\.shape: got \[-1\], expected a list"),
        (
            lambda d: d["vectors"][2]["outputs"][0].update(axes=["row"]),
            r"axes: got \['row'\], expected a name for each",
        ),
        (lambda d: d["operations"]["gelu"].update(file="../x.safetensors"), r"operations\[gelu\]\.file: got '\.\./x"),
        (lambda d: d["operations"]["gelu"].update(file="a\\b.safetensors"), r"operations\[gelu\]\.file"),
        (lambda d: d["operations"]["gelu"].update(file="gelu.bin"), r"expected the name of a \.safetensors file"),
    ],
)
def test_a_broken_field_is_named(copied: Path, edit: Edit, complaint: str) -> None:
    with pytest.raises(InvalidFormatError, match=complaint):
        read_manifest(edited(copied, edit))


@pytest.mark.clause("GV-FORMAT-2")
def test_another_version_and_no_manifest(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"version: got 2, expected 1"):
        read_manifest(edited(copied, lambda document: document.update(version=2)))
    with pytest.raises(NotFoundError, match=r"manifest\.json: no such file"):
        read_manifest(tmp_path)
    (copied / "manifest.json").write_text('{"format":', "utf-8")
    with pytest.raises(InvalidFormatError, match=r"manifest\.json: line 1"):
        read_manifest(copied)


@pytest.fixture
def right(reference: Mapping[str, Any], submit: Callable[[Mapping[str, Any]], Path]) -> Path:
    return submit(reference)


@pytest.mark.clause("GV-FORMAT-4")
def test_a_changed_truncated_or_absent_data_file_is_refused(copied: Path, right: Path) -> None:
    path = copied / "gelu.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InvalidFormatError, match=r"gelu\.safetensors: got SHA-256"):
        check_outputs(copied, right)
    path.write_bytes(data[:-8])
    with pytest.raises(
        InvalidFormatError, match=rf"gelu\.safetensors: got {len(data) - 8} bytes, expected {len(data)}"
    ):
        check_outputs(copied, right)
    path.unlink()
    with pytest.raises(NotFoundError, match=r"gelu\.safetensors: no such file"):
        check_outputs(copied, right)
    assert check_outputs(copied, right, ["silu_mul"]).passed


@pytest.mark.clause("GV-FORMAT-3")
def test_a_manifest_that_contradicts_its_file_is_refused(copied: Path, right: Path) -> None:
    def reshape(document: dict[str, Any]) -> None:
        document["vectors"][0]["outputs"][0]["shape"] = [64, 4]

    def rename(document: dict[str, Any]) -> None:
        document["vectors"][0]["outputs"][0] = {**document["vectors"][0]["outputs"][0], "shape": [4, 64], "name": "z"}

    with pytest.raises(
        InvalidFormatError, match=r"rms_norm\.fp32\.1/value/y: got F64 \[4, 64\], expected F64 \[64, 4\]"
    ):
        check_outputs(edited(copied, reshape), right_shaped(right))
    with pytest.raises(NotFoundError, match=r"rms_norm\.fp32\.1/value/z"):
        check_outputs(edited(copied, rename), right_shaped(right))


def right_shaped(path: Path) -> Path:
    """Outputs of the shapes that the contradicting manifests ask for."""
    import numpy as np

    blank = np.zeros((4, 64), dtype=np.float32)
    path.write_bytes(encode({"rms_norm.fp32.1/y": blank.reshape(64, 4), "rms_norm.fp32.1/z": blank}))
    return path


@pytest.mark.clause("GV-FORMAT-1", "GV-WRITE-1")
def test_a_part_of_the_set_is_a_set(tmp_path: Path) -> None:
    written = write_vectors(tmp_path, ["argmax"], ["bf16"])
    assert read_manifest(tmp_path) == written
    assert {vector.storage for vector in written.vectors} == {"bf16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["argmax.safetensors", "manifest.json"]
