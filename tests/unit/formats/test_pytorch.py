"""PyTorch checkpoints without torch, judged by torch.load(weights_only=True)."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ferrum_ref.errors import FerrumError, InvalidFormatError, NotFoundError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.formats.byte_source import MemoryBytes
from ferrum_ref.formats.pytorch import PyTorchFile

LIMIT = 2**30


def saved(value: Any, legacy: bool = False) -> bytes:
    target = io.BytesIO()
    torch.save(value, target, _use_new_zipfile_serialization=not legacy)
    return target.getvalue()


def opened(content: bytes) -> PyTorchFile:
    return PyTorchFile(MemoryBytes(content, "x.pt"))


BASE = torch.arange(60, dtype=torch.float32).reshape(5, 12) / 7
STATE = {
    "plain": BASE,
    "transposed": BASE.T,
    "slice": BASE[1:4, 2:11:3],
    "expanded": BASE[0].expand(3, 12),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(BASE[2]),
    **{str(kind): (BASE * 3).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16, torch.bool)},
    **{str(kind): (BASE * 3).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
    "nothing": None,
    "step": 7,
}
NEWER = {
    str(kind): (BASE / 3).to(kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32)
}


@pytest.mark.clause("WL-TORCH-1", "WL-TORCH-2", "WL-TORCH-6")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_equals_torch(legacy: bool) -> None:
    content = saved(STATE if legacy else {**STATE, **NEWER}, legacy)
    expected = torch.load(io.BytesIO(content), weights_only=True)
    file = opened(content)
    assert list(file.tensors) == [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    for name, stored in file.tensors.items():
        found = file.read(name, LIMIT)
        assert found.shape == stored.shape == tuple(expected[name].shape)
        np.testing.assert_array_equal(found.astype(np.float64), expected[name].detach().double().numpy(), err_msg=name)
        assert found.nbytes == stored.num_bytes
        assert found.flags.c_contiguous
    with pytest.raises(NotFoundError, match="no such name"):
        file.read("absent", LIMIT)


@pytest.mark.clause("WL-TORCH-4")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_names(legacy: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert list(opened(saved(model.state_dict(), legacy)).tensors) == list(model.state_dict())
    nested = {"model": {"w": BASE, "layers": [BASE, {"b": BASE}]}, 5: BASE, "epoch": 3}
    assert list(opened(saved(nested, legacy)).tensors) == ["model.w", "model.layers.0", "model.layers.1.b", "5"]
    assert list(opened(saved(BASE, legacy)).tensors) == ["tensor"]
    with pytest.raises(InvalidFormatError, match="each name once"):
        opened(saved({"a.b": BASE, "a": {"b": BASE}}, legacy))
    ordered = collections.OrderedDict([("z", BASE), ("a", BASE)])
    assert list(opened(saved(ordered, legacy)).tensors) == ["z", "a"]


class Evil:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts[0], self.parts[1:]


@pytest.mark.clause("WL-TORCH-5", "WL-PICKLE-2")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_code_is_not_run(legacy: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UnsupportedError, match="nothing in the file was executed"):
        opened(saved({"w": BASE, "x": Evil(exec, f"open({str(canary)!r}, 'w')")}, legacy))
    assert not canary.exists()
    with pytest.raises(UnsupportedError, match=r"global: got argparse\.Namespace"):
        opened(saved({"w": BASE, "args": argparse.Namespace(lr=1)}, legacy))


@pytest.mark.clause("WL-TORCH-5")
def test_other_archives() -> None:
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as file:
        file.writestr("m/data.pkl", pickle.dumps({}, 2))
        file.writestr("m/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(UnsupportedError, match="TorchScript program"):
        opened(script.getvalue())
    for name in ("data.pkl", "a/b/data.pkl", "a/other.pkl"):
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as file:
            file.writestr(name, b"")
        with pytest.raises(InvalidFormatError, match=r"0 files data\.pkl"):
            opened(target.getvalue())
    for content in (b"", b"\x80", b"\x80\x02.", pickle.dumps(5, 2), pickle.dumps({"w": 1}, 2), b"torch" * 9):
        with pytest.raises(FerrumError):
            opened(content)


def changed(content: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target.getvalue()


def tensor_pickle(
    storage: bytes = b"K\x0c", offset: bytes = b"K\x00", shape: bytes = b"K\x0c\x85", strides: bytes = b"K\x01\x85"
) -> bytes:
    """{"w": a tensor} with every number chosen; the storage "0" has 12 float32 elements."""
    key = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpu" + storage + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + key + offset + shape + strides + b"\x89}tR"
    return b"\x80\x02}\x8c\x01w" + tensor + b"s."


def with_pickle(stream: bytes) -> PyTorchFile:
    content = saved({"w": torch.arange(12, dtype=torch.float32)})
    return opened(changed(content, lambda name, data: stream if name.endswith("data.pkl") else data))


HUGE = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
WINDOWS = {
    "beyond": {"offset": b"K\x01"},
    "far offset": {"offset": HUGE, "shape": b"K\x01\x85"},
    "stride": {"strides": b"K\x02\x85"},
    "negative stride": {"strides": b"J\xff\xff\xff\xff\x85"},
    "negative offset": {"offset": b"J\xff\xff\xff\xff"},
    "huge": {"shape": HUGE + b"\x85", "strides": b"K\x00\x85"},
    "huge squared": {"shape": b"\x8a\x07" + b"\xff" * 6 + b"\x0f" + b"2\x86", "strides": b"K\x00K\x00\x86"},
    "zero times huge": {"shape": HUGE + b"K\x00\x86", "strides": b"K\x00K\x00\x86"},
    "ranks": {"strides": b"K\x01K\x01\x86"},
    "float": {"shape": b"G" + b"\x00" * 8 + b"\x85"},
    "bool": {"shape": b"\x88\x85"},
    "none": {"shape": b"N"},
    "storage too large": {"storage": b"K\x0d"},
    "storage too small": {"storage": b"K\x0b", "shape": b"K\x01\x85"},
    "storage negative": {"storage": b"J\xff\xff\xff\xff"},
    "storage huge": {"storage": HUGE},
}


@pytest.mark.clause("WL-TORCH-3")
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_outside_their_storage(name: str) -> None:
    with pytest.raises(InvalidFormatError):
        with_pickle(tensor_pickle(**WINDOWS[name]))


@pytest.mark.clause("WL-TORCH-3")
def test_windows_inside() -> None:
    assert with_pickle(tensor_pickle()).read("w", LIMIT).tolist() == list(range(12))
    last = with_pickle(tensor_pickle(offset=b"K\x0b", shape=b"K\x01\x85", strides=b"K\x63\x85"))
    assert last.read("w", LIMIT).tolist() == [11]
    wide = with_pickle(tensor_pickle(shape=b"J\xff\xff\xff\x7f\x85", strides=b"K\x00\x85"))  # 8 GiB of one element
    assert wide.tensors["w"].num_bytes == 4 * (2**31 - 1)
    with pytest.raises(ResourceExhaustedError, match="expected at most"):
        wide.read("w", LIMIT)


@pytest.mark.clause("WL-TORCH-3")
def test_storages_that_are_not_there() -> None:
    content = saved({"w": BASE})
    with pytest.raises(InvalidFormatError, match="an entry of the archive"):
        opened(changed(content, lambda name, data: None if name.endswith("data/0") else data))
    with pytest.raises(InvalidFormatError, match="storage 0"):
        opened(changed(content, lambda name, data: data[:-4] if name.endswith("data/0") else data))
    with pytest.raises(UnsupportedError, match="another byte order"):
        opened(changed(content, lambda name, data: b"big" if name.endswith("byteorder") else data))
    legacy = saved({"w": BASE}, legacy=True)
    for end in (len(legacy) - 1, len(legacy) - 300):
        with pytest.raises(FerrumError):
            opened(legacy[:end])


@pytest.mark.clause("WL-TORCH-4")
def test_values_that_contain_themselves() -> None:
    """A list in itself, and lists that hold the one before twice: 2**100 names if one followed them all."""
    laughs = b"]q\x00(NNe0" + b"".join(b"]q%c(h%ch%ce0" % (i, i - 1, i - 1) for i in range(1, 100)) + b"h\x63."
    for stream in (b"]q\x00h\x00a.", b"}q\x00K\x01h\x00s.", laughs):
        with pytest.raises(InvalidFormatError, match="nesting"):
            with_pickle(b"\x80\x02" + stream)
