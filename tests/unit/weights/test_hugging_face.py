"""Weights from a hub on loopback that answers as Hugging Face's does, through huggingface_hub and its cache."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

from ferrum_ref.errors import (
    InvalidFormatError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.weights import WeightSource
from ferrum_ref.weights.settings import Access

Make = Callable[..., Any]
COMMIT = "a" * 40
FILE = "sub/w.safetensors"


@dataclass
class Hub:
    """Files by path; the SHA-256 that the hub claims where it is not the true one; what was asked."""

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    claims: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @property
    def access(self) -> Access:
        return Access(hub_endpoint=self.endpoint, hub_token="hf_tokentoken", pause=lambda seconds: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            hub.log.append((self.command, self.path, dict(self.headers.items())))
            path = self.path.split("/resolve/main/")[-1].split(f"/resolve/{COMMIT}/")[-1]
            if self.path.startswith("/gone/") or path not in hub.files:
                missing = "RepoNotFound" if self.path.startswith("/gone/") else "EntryNotFound"
                self.send_response(403 if path in hub.codes else 404)
                self.send_header("X-Error-Code", hub.codes.get(path, missing))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = hub.files[path]
            wanted = self.headers.get("Range") if with_body else None
            start, end = 0, len(data)
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(len(data), int(last) + 1 if last else len(data))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            else:
                self.send_response(200)
            etag = hub.claims.get(path, hashlib.sha256(data).hexdigest())
            for name, value in {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{etag}"',
                "Content-Length": str(end - start),
                "Connection": "close",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data[start:end])
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
        huggingface_hub.close_session()


def source(filename: str = FILE, repo_id: str = "me/tiny", cache_dir: str | None = None) -> WeightSource:
    return WeightSource.HuggingFace(repo_id, filename, None, cache_dir)


@pytest.mark.clause("WL-HUB-1", "WL-CACHE-2")
def test_loads_through_the_hubs_cache(
    hub: Hub, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    hub.files[FILE] = safetensors(w=values)
    loader = make_loader(access=hub.access)
    np.testing.assert_array_equal(load(loader, spec(source(), values.shape)), values)
    assert (tmp_path / "cache" / "hub" / "models--me--tiny" / "snapshots" / COMMIT / FILE).exists()
    assert all("hf_tokentoken" in headers["authorization"] for _, _, headers in hub.log)
    num_gets = sum(method == "GET" for method, _, _ in hub.log)
    np.testing.assert_array_equal(load(make_loader(access=hub.access), spec(source(), values.shape)), values)
    assert sum(method == "GET" for method, _, _ in hub.log) == num_gets
    own = source(cache_dir=str(tmp_path / "own"))
    np.testing.assert_array_equal(load(loader, spec(own, values.shape)), values)
    assert (tmp_path / "own" / "models--me--tiny").exists()


@pytest.mark.clause("WL-HUB-1")
def test_without_caching_nothing_stays(
    hub: Hub, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    hub.files[FILE] = safetensors(w=values)
    loader = make_loader(access=hub.access, enable_caching=False)
    np.testing.assert_array_equal(load(loader, spec(source(), values.shape)), values)
    assert not (tmp_path / "cache").exists()


@pytest.mark.clause("WL-META-2", "WL-LOAD-6")
def test_metadata_and_availability(hub: Hub, make_loader: Make, safetensors: Make, big: Any) -> None:
    hub.files[FILE] = safetensors(w=big)
    loader = make_loader(access=hub.access)
    assert asyncio.run(loader.get_metadata(source())).tensors == {"w": [1024, 512]}
    assert [headers.get("Range") for _, _, headers in hub.log] == ["bytes=0-65535"]
    assert asyncio.run(loader.is_available(source()))
    assert not asyncio.run(loader.is_available(source("absent.safetensors")))
    asyncio.run(loader.preload(source()))
    hub.files.clear()
    assert asyncio.run(loader.is_available(source()))  # from the cache


@pytest.mark.clause("WL-HUB-2")
def test_a_damaged_cached_file_is_fetched_again(
    hub: Hub, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any, tmp_path: Path
) -> None:
    hub.files[FILE] = safetensors(w=values)
    asyncio.run(make_loader(access=hub.access).preload(source()))
    blob = next((tmp_path / "cache" / "hub" / "models--me--tiny" / "blobs").iterdir())
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    np.testing.assert_array_equal(load(make_loader(access=hub.access), spec(source(), values.shape)), values)


@pytest.mark.clause("WL-HUB-2", "WL-HASH-2")
def test_a_file_that_is_not_the_promised_one(
    hub: Hub, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    hub.files[FILE], hub.claims[FILE] = safetensors(w=values), "b" * 64
    with pytest.raises(InvalidFormatError, match=f"sha256: got .*, expected {'b' * 64}"):
        load(make_loader(access=hub.access), spec(source(), values.shape))
    unchecked = make_loader(access=hub.access, enable_integrity_checks=False)
    np.testing.assert_array_equal(load(unchecked, spec(source(), values.shape)), values)


@pytest.mark.clause("WL-HUB-3")
def test_refusals(hub: Hub, make_loader: Make, spec: Make, load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.codes["gated.npy"] = "GatedRepo"
    loader = make_loader(access=hub.access)
    expected: list[tuple[WeightSource, type[Exception]]] = [
        (source("absent.npy"), NotFoundError),
        (source("x.npy", "gone/model"), NotFoundError),
        (source("gated.npy"), PermissionDeniedError),
        (source("../x.npy"), InvalidParameterError),
        (source("/etc/passwd"), InvalidParameterError),
        (source(""), InvalidParameterError),
        (source("x.npy", "no repo"), InvalidParameterError),
    ]
    for where, kind in expected:
        with pytest.raises(kind):
            load(loader, spec(where, (1,)))
        assert not asyncio.run(loader.is_available(where))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError):
        load(loader, spec(source("absent2.npy"), (1,)))
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        asyncio.run(loader.get_metadata(source("absent2.npy")))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'ferrum-ref\[hub\]'"):
        load(loader, spec(source(), (1,)))
