"""The committed set: what it holds, that writing it again gives it again, and what is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import FerrumIOError, InternalError, InvalidParameterError
from ferrum_ref.formats.safetensors import SafetensorsFile
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.vectors.arrays import read_tensor
from ferrum_ref.vectors.catalogue import GROUPS
from ferrum_ref.vectors.schema import Manifest
from ferrum_ref.vectors.selection import FP16, FP32, Group, Pick
from ferrum_ref.vectors.write import build, write_vectors

Arrays = Mapping[str, Any]
OPERATIONS = [
    "rms_norm",
    "rms_norm_residual",
    "layer_norm",
    "rotary_embedding",
    "attention",
    "paged_attention",
    "write_kv",
    "silu_mul",
    "gelu",
    "gelu_tanh",
    "softmax",
    "linear",
    "quantized_linear_q4_0",
    "quantized_linear_q8_0",
    "quantized_linear_q4_k",
    "embedding",
    "argmax",
]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.clause("GV-WRITE-1", "GV-FORMAT-5")
def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_vectors(tmp_path / "a")
    write_vectors(tmp_path / "deeper" / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "deeper" / "b")
    write_vectors(tmp_path / "a")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "deeper" / "b")


@pytest.mark.clause("GV-SET-3")
def test_the_committed_set_is_what_is_written(tmp_path: Path, manifest: Manifest, stored: Arrays) -> None:
    """Float64 functions may differ in their last bits from one processor to another; everything else may not."""
    again = write_vectors(tmp_path)
    assert again.vectors == manifest.vectors
    assert again.algorithm == manifest.algorithm
    assert {name: entry.meaning for name, entry in again.operations.items()} == {
        name: entry.meaning for name, entry in manifest.operations.items()
    }
    written = {}
    for entry in again.operations.values():
        file = SafetensorsFile(tmp_path / entry.file)
        written |= {name: read_tensor(file, name) for name in file.tensors}
        file.close()
    assert written.keys() == stored.keys()
    for vector in manifest.vectors:
        for one in vector.inputs:
            name = vector.input_tensor(one.name)
            assert written[name].tobytes() == stored[name].tobytes(), name
        for output in vector.outputs:
            value, got = (found[vector.value_tensor(output.name)] for found in (stored, written))
            if output.exact:
                assert value.tobytes() == got.tobytes()
                continue
            bound, new_bound = (found[vector.bound_tensor(output.name)] for found in (stored, written))
            with np.errstate(invalid="ignore"):
                same = (value == got) | (np.abs(value - got) < 2.0**-20 * bound) | (np.isnan(value) & np.isnan(got))
            assert np.all(same), vector.name
            assert np.all(np.abs(bound - new_bound) <= 2.0**-20 * bound), vector.name


@pytest.mark.clause("GV-SET-3", "GV-FORMAT-4")
def test_the_set_is_small_and_holds_nothing_else(vector_set: Path, manifest: Manifest) -> None:
    files = bytes_of(vector_set)
    assert sum(map(len, files.values())) < 2**20
    assert set(files) == {"manifest.json", *(entry.file for entry in manifest.operations.values())}
    for entry in manifest.operations.values():
        assert (len(files[entry.file]), hashlib.sha256(files[entry.file]).hexdigest()) == (
            entry.num_bytes,
            entry.sha256,
        )


@pytest.mark.clause("GV-SET-1")
def test_every_operation_is_there_in_16_bits_too(manifest: Manifest) -> None:
    assert list(manifest.operations) == OPERATIONS
    types: dict[str, set[str]] = {}
    for vector in manifest.vectors:
        types.setdefault(vector.operation, set()).add(vector.storage)
    assert all("bf16" in found and {"fp32", "fp16"} & found for found in types.values())
    paged = [vector for vector in manifest.vectors if vector.operation == "paged_attention"]
    flags = {flag for vector in paged for flag in vector.flags}
    assert {"ragged lengths", "empty sequence", "window", "soft cap", "sinks", "last block ragged"} <= flags
    windows = {vector.parameters["sliding_window"] for vector in paged}
    caps = {vector.parameters["logit_softcap"] for vector in paged}
    assert max(windows) > 0
    assert max(caps) > 0
    assert any(one.name == "sinks" for vector in paged for one in vector.inputs)


@pytest.mark.clause("GV-SET-2")
def test_every_vector_says_why_it_exists(manifest: Manifest, repository: Path) -> None:
    clauses = set()
    for path in (repository / "specs").glob("*.md"):
        clauses |= set(re.findall(r"^\*\*([A-Z]{2}-[A-Z0-9]+-\d+)\*\* ", path.read_text("utf-8"), re.MULTILINE))
    for vector in manifest.vectors:
        assert vector.flags
        assert all(vector.flags)
        assert vector.clauses
        assert set(vector.clauses) <= clauses, vector.name
        assert vector.name == f"{vector.operation}.{vector.storage}.{vector.origin.split()[-3]}"
    flags = {flag for vector in manifest.vectors for flag in vector.flags}
    assert {"needle at the window edge", "cancellation", "D-16", "D-03", "D-15", "lost terms", "subnormal"} <= flags


@pytest.mark.clause("GV-BOUND-2")
def test_the_manifest_repeats_the_declaration(manifest: Manifest) -> None:
    assert Algorithm(**manifest.algorithm) == Algorithm()
    assert manifest.algorithm["accumulate"] == "fp32"


@pytest.mark.clause("GV-FORMAT-3", "GV-FORMAT-5")
def test_the_library_reads_every_file(vector_set: Path, manifest: Manifest) -> None:
    """safetensors' own reader: names, types and shapes are those of the manifest, and there is nothing else."""
    from safetensors import safe_open

    found = {}
    for entry in manifest.operations.values():
        with safe_open(vector_set / entry.file, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    expected = {}
    for vector in manifest.vectors:
        expected |= {vector.input_tensor(one.name): (one.dtype, one.shape) for one in vector.inputs}
        for output in vector.outputs:
            value = output.dtype if output.exact else "F64"
            expected[vector.value_tensor(output.name)] = (value, output.shape)
            if not output.exact:
                expected[vector.bound_tensor(output.name)] = ("F64", output.shape)
    assert found == expected


@pytest.mark.clause("GV-WRITE-1")
def test_progress_is_told(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    write_vectors(tmp_path, ["argmax"], ["fp16"], lambda *step: steps.append(step))
    assert steps == [(0, 2, "argmax fp16"), (1, 2, "argmax fp16"), (2, 2, "")]


@pytest.mark.clause("GV-WRITE-2")
def test_a_wrong_choice_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(InvalidParameterError, match="operation 'matmul' has none; expected one of rms_norm, "):
        write_vectors(folder, ["argmax", "matmul"])
    with pytest.raises(InvalidParameterError, match="dtype 'int8'"):
        write_vectors(folder, [], ["int8"])
    with pytest.raises(InvalidParameterError, match="no vector has this operation in this element type"):
        write_vectors(folder, ["gelu_tanh"], ["fp16"])
    assert not folder.exists()
    folder.write_text("in the way", "utf-8")
    with pytest.raises(FerrumIOError, match="set: File exists"):
        write_vectors(folder, ["argmax"])


@pytest.mark.clause("GV-WRITE-2")
def test_a_file_that_cannot_be_replaced_leaves_no_half_of_it(tmp_path: Path) -> None:
    (tmp_path / "argmax.safetensors").mkdir()
    with pytest.raises(FerrumIOError, match=r"argmax\.safetensors"):
        write_vectors(tmp_path, ["argmax"])
    assert not (tmp_path / "manifest.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["argmax.safetensors"]


@pytest.mark.clause("GV-WRITE-3", "GV-BOUND-3")
@pytest.mark.parametrize(("operation", "index", "storage"), [("linear", 28, FP16), ("sample_token", 0, FP32)])
def test_a_case_beyond_the_plain_rule_is_refused(operation: str, index: int, storage: tuple[str, ...]) -> None:
    with pytest.raises(InternalError, match="choose another case"):
        build(Group(operation, "", (), ()), Pick(index, storage), *storage)


@pytest.mark.clause("GV-BOUND-3")
def test_no_bound_is_infinite_and_none_leaves_the_range(manifest: Manifest, stored: Arrays) -> None:
    largest = {"F32": 3.4028234663852886e38, "F16": 65504.0, "BF16": 3.3895313892515355e38}
    for vector in manifest.vectors:
        for output in vector.outputs:
            if output.exact:
                continue
            value, bound = stored[vector.value_tensor(output.name)], stored[vector.bound_tensor(output.name)]
            finite = np.isfinite(value)
            assert np.all(np.isfinite(bound))
            assert np.all(bound[~finite] == 0.0)
            assert np.all(bound[finite] >= 0.0)
            assert np.all(np.abs(value[finite]) + bound[finite] <= largest[output.dtype])


@pytest.mark.clause("GV-SET-1")
def test_the_catalogue_names_each_case_once() -> None:
    names = [(group.operation, pick.index) for group in GROUPS for pick in group.picks]
    assert len(set(names)) == len(names)
