"""ONNX initialisers against onnx's own numpy_helper; external data that stays in its directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ferrum_ref.errors import (
    FerrumIOError,
    InvalidFormatError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.formats.byte_source import MemoryBytes
from ferrum_ref.formats.onnx_initializers import OnnxFile

LIMIT = 2**30
NUMBERS = [0, 1, 2, 3, 5, 7]
TYPES = {
    name: getattr(TensorProto, name)
    for name in (
        *("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "BOOL", "UINT4", "INT4"),
        *("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
    )
}


def model(*initializers: TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], initializer=initializers), producer_name="maker")


def opened(*initializers: TensorProto, directory: Path | None = None) -> OnnxFile:
    return OnnxFile(MemoryBytes(model(*initializers).SerializeToString(), "x.onnx"), directory)


@pytest.mark.clause("WL-ONNX-1", "WL-ONNX-2")
@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
@pytest.mark.parametrize("name", TYPES)
def test_every_type(name: str, raw: bool) -> None:
    """Typed fields and raw bytes, 4-bit types packed: as numpy_helper reads them."""
    values: Any = [value % 2 for value in NUMBERS] if name == "BOOL" else NUMBERS
    if raw:
        values = np.array(values).astype(helper.tensor_dtype_to_np_dtype(TYPES[name]))
        proto = numpy_helper.from_array(values.reshape(2, 3), "w")
    else:
        proto = helper.make_tensor("w", TYPES[name], [2, 3], values)
    file = opened(proto)
    found = file.read("w", LIMIT)
    expected = numpy_helper.to_array(proto)
    assert found.shape == file.tensors["w"].shape == (2, 3)
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))
    assert found.dtype.itemsize == expected.dtype.itemsize


@pytest.mark.clause("WL-ONNX-1")
def test_names_and_scalars() -> None:
    odd = helper.make_tensor("odd", TensorProto.INT4, [3], [-8, 7, -1])
    file = opened(numpy_helper.from_array(np.float32(2.5), "s"), odd, helper.make_tensor("e", 1, [0, 2], []))
    assert list(file.tensors) == ["s", "odd", "e"]
    assert (file.producer, file.read("s", LIMIT).shape, file.read("e", LIMIT).shape) == ("maker", (), (0, 2))
    assert file.read("odd", LIMIT).astype(int).tolist() == [-8, 7, -1]
    assert file.tensors["odd"].num_bytes == 2
    assert file.read("odd", LIMIT).dtype == ml_dtypes.int4
    with pytest.raises(NotFoundError, match="no such name"):
        file.read("absent", LIMIT)
    with pytest.raises(ResourceExhaustedError, match="got 4 bytes, expected at most 3"):
        file.read("s", 3)


def lying(**changes: Any) -> TensorProto:
    proto = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    for key, value in changes.items():
        if key == "dims":
            proto.dims[:] = value
        else:
            setattr(proto, key, value)
    return proto


@pytest.mark.clause("WL-ONNX-2", "WL-ONNX-3")
@pytest.mark.parametrize(
    "proto",
    [
        lying(dims=[3]),
        lying(dims=[-2]),
        lying(dims=[2**62, 2**62]),
        lying(dims=[1] * 40),
        lying(dims=[0, 2**62]),
        lying(raw_data=b"\x00" * 7),
        lying(raw_data=b"\x00" * 9),
        lying(data_type=TensorProto.DOUBLE),
        lying(name=""),
        helper.make_tensor("w", TensorProto.INT32, [1], [1]),
    ],
)
def test_lies(proto: TensorProto) -> None:
    if proto.data_type == TensorProto.INT32:  # a value that the small type it claims cannot hold
        proto.int32_data[0], proto.data_type = 300, TensorProto.INT8
    with pytest.raises(InvalidFormatError):
        opened(proto).read("w", LIMIT)


@pytest.mark.clause("WL-ONNX-3")
def test_what_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b"\xff" * 50, b"\x08\x01", model(lying(), lying()).SerializeToString()):
        with pytest.raises(InvalidFormatError):
            OnnxFile(MemoryBytes(content, "x.onnx"), None)
    broken = model(lying()).SerializeToString().replace(b"\x01w", b"\x01\xff")  # a name that is not UTF-8
    with pytest.raises(InvalidFormatError, match="UTF-8"):
        OnnxFile(MemoryBytes(broken, "x.onnx"), None)
    with pytest.raises(UnsupportedError, match="element type 8"):
        opened(helper.make_tensor("w", TensorProto.STRING, [1], [b"a"]))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'ferrum-ref\[onnx\]'"):
        OnnxFile(MemoryBytes(b"x", "x.onnx"), None)


def external(**facts: str) -> TensorProto:
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in facts.items():
        entry = proto.external_data.add()
        entry.key, entry.value = key, value
    return proto


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model's directory with data, and with ways out of it."""
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    content = np.arange(8, dtype="<f4").tobytes()
    for path in (tmp_path / "secret", inside / "w.bin", inside / "sub" / "w.bin"):
        path.write_bytes(content)
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "out").symlink_to(tmp_path)
    (inside / "good").symlink_to(inside / "w.bin")
    (inside / "loop").symlink_to(inside / "loop")
    return inside


@pytest.mark.clause("WL-ONNX-4")
@pytest.mark.parametrize(
    ("facts", "first"),
    [
        ({"location": "w.bin", "length": "16"}, 0),
        ({"location": "w.bin", "offset": "16"}, 4),
        ({"location": "sub/w.bin", "offset": "4", "length": "16", "checksum": "x"}, 1),
        ({"location": "good", "offset": "8", "length": "16"}, 2),
    ],
)
def test_external_data(facts: dict[str, str], first: int, directory: Path) -> None:
    assert opened(external(**facts), directory=directory).read("w", LIMIT).tolist() == list(range(first, first + 4))


@pytest.mark.clause("WL-ONNX-4")
@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/hostname",
        "sub/../../secret",
        "link",
        "out/secret",
        "C:\\w.bin",
        "..\\secret",
        "",
        ".",
        "a\x00b",
    ],
)
def test_external_data_never_leaves_the_directory(location: str, directory: Path) -> None:
    with pytest.raises((InvalidFormatError, FerrumIOError)) as caught:
        opened(external(location=location, length="16"), directory=directory).read("w", LIMIT)
    assert isinstance(caught.value, InvalidFormatError) or location == "."


@pytest.mark.clause("WL-ONNX-4")
@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"location": "absent"}, NotFoundError),
        ({"location": "w.bin", "length": "17"}, InvalidFormatError),
        ({"location": "w.bin", "offset": "20", "length": "16"}, InvalidFormatError),
        ({"location": "w.bin", "offset": "99999999999999999999"}, InvalidFormatError),
        ({"location": "w.bin", "offset": "-4", "length": "16"}, InvalidFormatError),
        ({"location": "w.bin"}, InvalidFormatError),
        ({"location": "loop"}, InvalidFormatError),
        ({"location": "sub"}, FerrumIOError),
        ({}, InvalidFormatError),
    ],
)
def test_external_data_that_lies(facts: dict[str, str], kind: type[Exception], directory: Path) -> None:
    with pytest.raises(kind):
        opened(external(**facts), directory=directory).read("w", LIMIT)
    with pytest.raises(UnsupportedError, match="not a local file"):
        opened(external(location="w.bin")).read("w", LIMIT)
