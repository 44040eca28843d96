"""The cache: whole files only, the longest unused go first, damage is noticed."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ferrum_ref.errors import FerrumIOError, NetworkError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.weights import WeightSource
from ferrum_ref.weights.cache import WeightCache
from ferrum_ref.weights.sources.names import cache_key

Make = Callable[..., Any]


def keep(cache: WeightCache, key: str, content: bytes) -> Path:
    partial = cache.partial()
    partial.write_bytes(content)
    return cache.keep(key, partial, "a name", hashlib.sha256(content).hexdigest())


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.clause("WL-CACHE-1", "WL-CACHE-2")
def test_a_second_load_asks_nobody(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    content = site.files["w.safetensors"] = safetensors(w=values)
    source = WeightSource.Url(site.url("w.safetensors?X-Amz-Signature=one&part=1"), {})
    load(make_loader(), spec(source, values.shape))
    site.files.clear()
    again = WeightSource.Url(site.url("w.safetensors?part=1&X-Amz-Signature=another"), {})
    np.testing.assert_array_equal(load(make_loader(), spec(again, values.shape)), values)
    assert len(site.log) == 1
    key = cache_key(source)
    assert files(tmp_path / "cache") == [f"{key}.json", f"{key}.weights"]
    record = json.loads((tmp_path / "cache" / f"{key}.json").read_text())
    assert record == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "num_bytes": len(content),
        "name": site.url("w.safetensors?..."),
    }
    other = WeightSource.Url(site.url("w.safetensors?part=2"), {})
    assert cache_key(other) != key
    assert asyncio.run(make_loader().is_available(source))


@pytest.mark.clause("WL-CACHE-1")
def test_caching_off_keeps_nothing(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    site.files["w.safetensors"] = safetensors(w=values)
    loader = make_loader(enable_caching=False)
    source = WeightSource.Url(site.url("w.safetensors"), {})
    for _ in range(2):
        np.testing.assert_array_equal(load(loader, spec(source, values.shape)), values)
    assert len(site.log) == 2
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UnsupportedError, match="caching is off"):
        asyncio.run(loader.preload(source))


@pytest.mark.clause("WL-LOAD-7")
def test_preload_fetches_and_load_does_not(
    site: Any, loader: Any, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    site.files["w.safetensors"] = safetensors(w=values)
    source = WeightSource.Url(site.url("w.safetensors"), {})
    asyncio.run(loader.preload(source))
    site.files.clear()
    np.testing.assert_array_equal(load(loader, spec(source, values.shape)), values)


@pytest.mark.clause("WL-CACHE-3", "WL-HASH-3")
@pytest.mark.parametrize("damage", ["bit", "cut", "grown", "record", "no record", "record of another"])
def test_a_damaged_entry_is_fetched_again(
    damage: str, site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    site.files["w.safetensors"] = safetensors(w=values)
    source = WeightSource.Url(site.url("w.safetensors"), {})
    load(make_loader(), spec(source, values.shape))
    content = next((tmp_path / "cache").glob("*.weights"))
    record = content.with_suffix(".json")
    data = content.read_bytes()
    if damage == "bit":
        content.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        content.write_bytes(data[:-1])
    elif damage == "grown":
        content.write_bytes(data + b"x")
    elif damage == "record":
        record.write_text("{")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps({"sha256": "0" * 64, "num_bytes": len(data)}))
    np.testing.assert_array_equal(load(make_loader(), spec(source, values.shape)), values)
    assert len(site.log) == 2
    assert content.read_bytes() == data


@pytest.mark.clause("WL-HASH-3")
def test_checks_can_be_switched_off(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    site.files["w.safetensors"] = safetensors(w=values)
    source = WeightSource.Url(site.url("w.safetensors"), {})
    load(make_loader(), spec(source, values.shape))
    content = next((tmp_path / "cache").glob("*.weights"))
    data = content.read_bytes()
    content.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = load(make_loader(enable_integrity_checks=False), spec(source, values.shape))
    assert (found != values).sum() == 1
    assert len(site.log) == 1


@pytest.mark.clause("WL-HASH-3")
def test_another_checksum_makes_an_entry_stale(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    site.files["w.safetensors"] = safetensors(w=values)
    load(make_loader(), spec(WeightSource.Url(site.url("w.safetensors"), {}), values.shape))
    content = site.files["w.safetensors"] = safetensors(w=values + 1)
    newer = WeightSource.Url(site.url(f"w.safetensors#sha256={hashlib.sha256(content).hexdigest()}"), {})
    np.testing.assert_array_equal(load(make_loader(), spec(newer, values.shape)), values + 1)


@pytest.mark.clause("WL-CACHE-1")
def test_a_failed_download_leaves_nothing(
    site: Any, make_loader: Make, spec: Make, load: Make, limits: Make, tmp_path: Path
) -> None:
    site.files["w.safetensors"], site.cut_after_bytes = b"x" * 1000, [10] + [0] * 20
    with pytest.raises(NetworkError):
        load(make_loader(limits=limits(max_resumes=2)), spec(WeightSource.Url(site.url("w.safetensors"), {}), (1,)))
    assert files(tmp_path / "cache") == []


@pytest.mark.clause("WL-CACHE-4")
def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 250, verify=True)
    for key in "abc":  # c pushes a out
        keep(cache, key, key.encode() * 100)
    assert [cache.find(key, None) is not None for key in "abc"] == [False, True, True]
    assert cache.find("b", None) is not None  # now c is the longest unused
    keep(cache, "d", b"d" * 100)
    assert [cache.find(key, None) is not None for key in "bcd"] == [True, False, True]
    assert cache.num_bytes() == 200


@pytest.mark.clause("WL-CACHE-4", "WL-CACHE-5")
def test_larger_than_the_cache(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    """It loads, and what the cache held stays there."""
    site.files.update({"w.safetensors": safetensors(w=values), "s.npy": safetensors(w=values[:1])})
    loader = make_loader(max_cache_size=10_000)
    small, large = (WeightSource.Url(site.url(name), {}) for name in ("s.npy", "w.safetensors"))
    loader_small = spec(WeightSource.Url(site.url("s.npy"), {}), (1, 512))
    with pytest.raises(Exception, match="magic"):
        load(loader, loader_small)
    np.testing.assert_array_equal(load(loader, spec(large, values.shape)), values)
    assert files(tmp_path / "cache") == [f"{cache_key(small)}.json", f"{cache_key(small)}.weights"]
    with pytest.raises(ResourceExhaustedError, match="raise max_cache_size"):
        asyncio.run(loader.preload(large))


@pytest.mark.clause("WL-CACHE-5")
def test_a_reader_keeps_a_file_that_is_evicted(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    site.files["w.safetensors"] = safetensors(w=values)
    loader = make_loader()
    container = loader._opener.open(WeightSource.Url(site.url("w.safetensors"), {}))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    np.testing.assert_array_equal(container.read("w", 2**30), values)


@pytest.mark.clause("WL-CACHE-1")
def test_a_directory_that_cannot_be(make_loader: Make, site: Any, spec: Make, load: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    site.files["w.npy"] = b"x"
    with pytest.raises(FerrumIOError, match="weight cache"):
        load(make_loader(cache_dir=str(tmp_path / "file")), spec(WeightSource.Url(site.url("w.npy"), {}), (1,)))


class CacheMachine(RuleBasedStateMachine):
    """Against a model: an ordered list of keys and contents."""

    LIMIT = 300

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.cache = WeightCache(Path(self.folder.name), self.LIMIT, verify=True)
        self.model: dict[str, bytes] = {}  # the longest unused first

    @rule(key=st.sampled_from("abcdef"), size=st.integers(0, 200), fill=st.integers(0, 255))
    def put(self, key: str, size: int, fill: int) -> None:
        content = bytes([fill]) * size
        keep(self.cache, key, content)
        self.model.pop(key, None)
        self.model[key] = content
        for old in list(self.model):
            if sum(map(len, self.model.values())) > self.LIMIT and old != key:
                del self.model[old]

    @rule(key=st.sampled_from("abcdef"))
    def get(self, key: str) -> None:
        found = self.cache.find(key, None)
        assert (found is not None) == (key in self.model)
        if found is not None:
            assert found.read_bytes() == self.model[key]
            self.model[key] = self.model.pop(key)

    @rule(key=st.sampled_from("abcdef"))
    def remove(self, key: str) -> None:
        self.cache.remove(key)
        self.model.pop(key, None)

    @rule()
    def reopen(self) -> None:
        self.cache = WeightCache(Path(self.folder.name), self.LIMIT, verify=True)

    @invariant()
    def accounts(self) -> None:
        assert self.cache.num_bytes() == sum(map(len, self.model.values())) <= self.LIMIT
        assert len(files(Path(self.folder.name))) == 2 * len(self.model)

    def teardown(self) -> None:
        self.folder.cleanup()


TestCacheMachine = pytest.mark.clause("WL-CACHE-1", "WL-CACHE-4")(CacheMachine.TestCase)
TestCacheMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
