"""Checkpoints in several files: only the shard that is needed is opened; the index may not lead elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from ferrum_ref.errors import InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.weights import WeightFormat, WeightSource
from ferrum_ref.weights.sources.names import is_plain_name, sibling

Make = Callable[..., Any]
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
INDEX = "model.safetensors.index.json"
SHARDS = {"model-1.safetensors": save({"a": A}), "model-2.safetensors": save({"b": B})}
WEIGHT_MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
INDEX_BYTES = json.dumps({"metadata": {"total_size": 32}, "weight_map": WEIGHT_MAP}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**SHARDS, INDEX: INDEX_BYTES}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.clause("WL-SHARD-1", "WL-OPEN-2", "WL-META-1")
def test_a_directory_and_its_index(folder: Path, loader: Any, spec: Make, load: Make) -> None:
    for path in (folder, folder / INDEX):
        source = WeightSource.File(str(path), None)
        np.testing.assert_array_equal(load(loader, spec(source, (2, 3), name="a")), A)
        np.testing.assert_array_equal(load(loader, spec(source, (4,), name="b")), B)
        with pytest.raises(NotFoundError, match="absent"):
            load(loader, spec(source, (4,), name="absent"))
        found = asyncio.run(loader.get_metadata(source))
        assert found.tensors == {"a": [2, 3], "b": [4]}
        assert (found.total_size_bytes, found.format) == (32, WeightFormat.SafeTensors)
        assert found.extra == {"total_size": 32}


@pytest.mark.clause("WL-SHARD-1")
def test_pytorch_shards(tmp_path: Path, loader: Any, spec: Make, load: Make) -> None:
    torch.save({"a": torch.from_numpy(A)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    source = WeightSource.File(str(tmp_path), None)
    np.testing.assert_array_equal(load(loader, spec(source, (2, 3), name="a")), A)
    assert asyncio.run(loader.get_metadata(source)).format == WeightFormat.PyTorch


@pytest.mark.clause("WL-SHARD-2", "WL-SHARD-3")
def test_over_http_only_what_is_needed(site: Any, make_loader: Make, spec: Make, load: Make) -> None:
    site.files.update({f"m/{name}": content for name, content in {**SHARDS, INDEX: INDEX_BYTES}.items()})
    loader = make_loader()
    source = WeightSource.Url(site.url(f"m/{INDEX}?key=1#x"), {"X-Key": "k"})
    np.testing.assert_array_equal(load(loader, spec(source, (4,), name="b")), B)
    assert [seen.path for seen in site.log] == [f"/m/{INDEX}?key=1", "/m/model-2.safetensors?key=1"]
    assert all(seen.headers["X-Key"] == "k" for seen in site.log)
    asyncio.run(loader.preload(source))
    assert [seen.path for seen in site.log][2:] == ["/m/model-1.safetensors?key=1"]
    fresh = make_loader(enable_caching=False)
    site.log.clear()
    assert asyncio.run(fresh.get_metadata(source)).tensors == {"a": [2, 3], "b": [4]}
    assert [seen.headers.get("Range") for seen in site.log] == [None, "bytes=0-65535", "bytes=0-65535"]


def write_index(folder: Path, index: Any) -> WeightSource:
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return WeightSource.File(str(folder / INDEX), None)


@pytest.mark.clause("WL-SHARD-1")
@pytest.mark.parametrize(
    "shard",
    [
        "../secret",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "a\x00b",
        "x" * 300,
        INDEX,
        5,
        None,
        ["a"],
        "a?b",
    ],
)
def test_shards_that_lead_elsewhere(shard: Any, folder: Path, loader: Any, spec: Make, load: Make) -> None:
    """Itself among them, which would open for ever."""
    source = write_index(folder, {"weight_map": {"a": "model-1.safetensors", "z": shard}})
    with pytest.raises(InvalidFormatError, match="expected a plain weight file"):
        load(loader, spec(source, (2, 3), name="a"))
    assert not is_plain_name(shard) or shard == INDEX


@pytest.mark.clause("WL-SHARD-1")
@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, [], b"{", b"", {"weight_map": "a"}])
def test_an_index_that_is_none(index: Any, folder: Path, loader: Any, spec: Make, load: Make) -> None:
    with pytest.raises(InvalidFormatError):
        load(loader, spec(write_index(folder, index), (2, 3), name="a"))


@pytest.mark.clause("WL-SHARD-3")
def test_promises_that_are_not_kept(folder: Path, loader: Any, spec: Make, load: Make) -> None:
    source = write_index(folder, {"weight_map": {"a": "model-2.safetensors", "b": "absent.safetensors"}})
    with pytest.raises(InvalidFormatError, match=r"got nothing in model-2\.safetensors, as the index says"):
        load(loader, spec(source, (2, 3), name="a"))
    with pytest.raises(NotFoundError):
        load(loader, spec(source, (2, 3), name="b"))


@pytest.mark.clause("WL-SHARD-2")
def test_what_lies_beside() -> None:
    beside = {
        WeightSource.File("/m/index.json", "t"): WeightSource.File("/m/x", "t"),
        WeightSource.HuggingFace("o/n", "sub/i.json", "r", None): WeightSource.HuggingFace("o/n", "sub/x", "r", None),
        WeightSource.HuggingFace("o/n", "i.json", None, "c"): WeightSource.HuggingFace("o/n", "x", None, "c"),
        WeightSource.S3("b", "k/i.json", None, "e"): WeightSource.S3("b", "k/x", None, "e"),
        WeightSource.S3("b", "i.json", None, None): WeightSource.S3("b", "x", None, None),
    }
    for source, expected in beside.items():
        assert sibling(source, "x") == expected
    with pytest.raises(UnsupportedError, match="in memory"):
        sibling(WeightSource.Memory(b"", WeightFormat.SafeTensors), "x")
    with pytest.raises(InvalidFormatError):
        sibling(WeightSource.File("/m/i", None), "../x")
