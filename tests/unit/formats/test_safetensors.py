"""The safetensors reader against the library's writer, and against headers that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.safetensors import SafetensorsFile

F4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.mark.clause("MD-SAFE-1", "MD-SAFE-4")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
def test_bytes_as_the_library_wrote_them(dtype: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in (("a", (3, 5)), ("b", (7,)))}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.tensors) == {"a", "b"}
    for name, values in tensors.items():
        assert file.tensors[name].shape == values.shape
        assert file.packed(name).shape[:-1] == values.shape[:-1]
        assert file.packed(name).tobytes() == values.tobytes()
    assert file.num_bytes == path.stat().st_size
    file.close()
    with pytest.raises(FerrumIOError, match="closed"):
        file.packed("a")


@pytest.mark.clause("MD-SAFE-1")
def test_absent(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")


LIES: dict[str, tuple[Any, int, int | None, str]] = {
    "short": (b"", 0, 2**40, "header: got 1099511627776 bytes in a file of 8"),
    "length beyond": ({"a": F4}, 16, 2**63, "header: got 9223372036854775808 bytes"),
    "not json": (b"{'a'", 0, None, "header: line 1 column 2"),
    "a list": (b"[]", 0, None, "header: got a list"),
    "twice": (b'{"a": 1, "a": 2}', 0, None, "got the name 'a' twice"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, None, "tensor 'a': got .* expected dtype, shape"),
    "dtype": ({"a": {**F4, "dtype": "F31"}}, 16, None, "tensor 'a': got dtype 'F31'"),
    "negative": ({"a": {**F4, "shape": [-4]}}, 16, None, r"got shape \[-4\]"),
    "bool": ({"a": {**F4, "shape": [True]}}, 16, None, r"got shape \[True\]"),
    "float": ({"a": {**F4, "shape": [4.0]}}, 16, None, r"got shape \[4.0\]"),
    "absurd": ({"a": {**F4, "shape": [2**62, 2**62]}}, 16, None, "got 16 bytes at 0, expected the"),
    "offsets swapped": ({"a": {**F4, "data_offsets": [16, 0]}}, 16, None, "got -16 bytes at 16"),
    "one offset": ({"a": {**F4, "data_offsets": [16]}}, 16, None, r"data_offsets \[16\]"),
    "truncated": ({"a": F4}, 15, None, "data: got 15 bytes in the file, expected the 16"),
    "trailing": ({"a": F4}, 17, None, "data: got 17 bytes in the file"),
    "gap": ({"a": F4, "b": {**F4, "data_offsets": [20, 36]}}, 36, None, "'b': got a begin at byte 20, expected 16"),
    "overlap": ({"a": F4, "b": {**F4, "data_offsets": [8, 24]}}, 24, None, "'b': got a begin at byte 8, expected 16"),
    "metadata": ({"__metadata__": {"a": [1]}, "a": F4}, 16, None, "."),
}


@pytest.mark.clause("MD-SAFE-2", "MD-SAFE-3")
@pytest.mark.parametrize("name", LIES)
def test_lies_are_named(name: str, tmp_path: Path) -> None:
    header, num_bytes, length, message = LIES[name]
    path = write(tmp_path / "lie.safetensors", header, b"\x00" * num_bytes, length)
    with pytest.raises(InvalidFormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("MD-SAFE-4", "MD-SAFE-5")
def test_bytes_are_views_of_the_file_that_outlive_closing(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"a": F4, "empty": {**F4, "shape": [0, 3], "data_offsets": [16, 16]}}, b"")
    path.write_bytes(path.read_bytes() + np.arange(4, dtype=np.float32).tobytes())
    file = SafetensorsFile(path)
    first, second = file.packed("a"), file.packed("a")
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    assert file.packed("empty").shape == (0, 0)
    with pytest.raises(NotFoundError, match="'b': got no such name"):
        file.packed("b")
    file.release("a")
    file.close()
    assert first.view(np.float32).tolist() == [0, 1, 2, 3]
    with pytest.raises(FerrumIOError, match="'a': the file was closed"):
        file.packed("a")


@pytest.mark.clause("MD-SAFE-4")
@pytest.mark.parametrize("padding", range(8))
def test_tensors_may_begin_at_any_byte(padding: int, tmp_path: Path) -> None:
    header = json.dumps({"a": F4}).encode() + b" " * padding
    values = np.array([1.5, -2.0, 3e-40, np.inf], np.float32)
    file = SafetensorsFile(write(tmp_path / "w.safetensors", header, values.tobytes()))
    assert file.packed("a").view(np.float32).tobytes() == values.tobytes()
