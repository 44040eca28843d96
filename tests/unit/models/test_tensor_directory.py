"""The tensors of a directory under canonical names, and what is refused on opening."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrum_ref.errors import FerrumError, InvalidFormatError, NotFoundError, ShapeError, UnsupportedError
from ferrum_ref.models.hf_directory import SafetensorsStore
from ferrum_ref.models.tensor_directory import TensorDirectory

EXPECTED = [("a", (2, 3)), ("b", (3,))]
TENSORS = {
    "x.a": np.arange(6, dtype=np.float32).reshape(2, 3) / 3,
    "x.b": np.float16([1, 2, 65504]),
    "head": np.ones(1),
}


def rename(stored: str) -> str | None:
    return None if stored == "head" else stored.removeprefix("x.").removeprefix("y.")


def write(directory: Path, tensors: dict[str, Any]) -> Path:
    save_file({name: np.asarray(value) for name, value in tensors.items()}, directory / "model.safetensors")
    return directory


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.clause("FM-FILES-1", "FM-FILES-3")
def test_canonical_names_and_one_rounding(tmp_path: Path) -> None:
    with TensorDirectory(write(tmp_path, TENSORS), EXPECTED, rename) as tensors:
        assert tensors.num_parameters == 9
        assert np.array_equal(tensors.read("a"), TENSORS["x.a"])
        assert tensors.read("b").tolist() == [1, 2, 65504]
        for kind in (np.float16, ml_dtypes.bfloat16, np.float64):
            assert np.array_equal(tensors.read("a", kind), TENSORS["x.a"].astype(kind))
            out = np.zeros((2, 3), kind)
            assert tensors.read("a", kind, out) is out
            assert np.array_equal(out, TENSORS["x.a"].astype(kind))
        with pytest.raises(NotFoundError, match="'head'"):
            tensors.read("head")
        with pytest.raises(ShapeError, match=r"out: got shape \[3, 2\]"):
            tensors.read("a", np.float32, np.zeros((3, 2), np.float32))


@pytest.mark.clause("FM-FILES-1")
def test_shards(tmp_path: Path) -> None:
    save_file({"x.a": TENSORS["x.a"]}, tmp_path / "one.safetensors")
    save_file({"x.b": TENSORS["x.b"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"x.a": "one.safetensors", "x.b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with TensorDirectory(tmp_path, EXPECTED, rename) as tensors:
        assert tensors.read("b")[2] == 65504
    index["weight_map"]["x.c"] = "two.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = num_open_files()
    with pytest.raises(InvalidFormatError, match=r"'x\.c'"):
        TensorDirectory(tmp_path, EXPECTED, rename)
    assert num_open_files() == before


REFUSED: dict[str, tuple[dict[str, Any], type[FerrumError], str]] = {
    "missing": ({"x.a": TENSORS["x.a"]}, InvalidFormatError, "tensor b: got nothing, expected shape"),
    "foreign": ({**TENSORS, "x.c": np.ones(1)}, InvalidFormatError, r"no place for \('x\.c'\)"),
    "doubled": ({**TENSORS, "y.a": np.ones((2, 3))}, InvalidFormatError, "got it again"),
    "shape": ({**TENSORS, "x.b": np.ones(4, np.float32)}, InvalidFormatError, r"tensor b: got shape \[4\]"),
    "element": ({**TENSORS, "x.b": np.ones(3, np.int64)}, UnsupportedError, "tensor b: got element format"),
}


@pytest.mark.clause("FM-FILES-1", "FM-FILES-2")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_opening_and_closed_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, error, text = REFUSED[name]
    write(tmp_path, tensors)
    closed: list[object] = []
    close = SafetensorsStore.close
    monkeypatch.setattr(SafetensorsStore, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(error, match=text):
        TensorDirectory(tmp_path, EXPECTED, rename)
    assert len(closed) == 1


@pytest.mark.clause("FM-FILES-1")
def test_a_lying_number_of_layers_costs_nothing(tmp_path: Path) -> None:
    endless = ((f"layer.{index}", (1,)) for index in range(10**12))
    with pytest.raises(InvalidFormatError, match=r"layer\.0"):
        TensorDirectory(write(tmp_path, TENSORS), endless, rename)
