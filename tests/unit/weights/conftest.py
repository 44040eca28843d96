"""A loader over the numpy factory, and an HTTP server that does ranges, cuts connections and keeps a log."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ferrum_ref.interfaces.weights import TensorSpec, TensorTransformation, WeightLoaderConfig, WeightSource
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.weights.loader import SourceWeightLoader
from ferrum_ref.weights.settings import Access, Limits

VALUES = np.random.default_rng(7).standard_normal((64, 512)).astype(np.float32)  # 128 KiB
BIG = np.random.default_rng(8).standard_normal((1024, 512)).astype(np.float32)  # 2 MiB: several chunks


@dataclass
class Seen:
    """One request as the server met it."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Site:
    """What the server serves and how it misbehaves; counters of what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    log: list[Seen] = field(default_factory=list)
    cut_after_bytes: list[int] = field(default_factory=list)  # one entry per connection to be cut
    statuses: list[int] = field(default_factory=list)  # answers to give instead, one per request
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    etag: str | None = '"v1"'
    last_modified: str | None = None
    content_length: bool = True
    answer_headers: dict[str, str] = field(default_factory=dict)
    secret: str | None = None  # the Authorization header that the files want
    echo: bool = False  # refusals quote the request
    address: str = ""
    gate: threading.Event | None = None  # answers wait for it

    def url(self, path: str) -> str:
        return f"http://{self.address}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    """GET with Range and If-Range, as RFC 9110 has them."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site, path = self.site, self.path.split("?")[0].lstrip("/")
        site.log.append(Seen("GET", self.path, dict(self.headers.items())))
        if site.gate is not None:
            site.gate.wait(20)
        if site.statuses:
            self.plain(site.statuses.pop(0))
        elif path in site.redirects:
            self.plain(302, {"Location": site.redirects[path]})
        elif path not in site.files:
            self.plain(404)
        elif site.secret is not None and self.headers.get("Authorization") != site.secret:
            self.plain(401)
        else:
            self.content(site.files[path])

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        body = (f"{self.path} {self.headers}" if self.site.echo else "no").encode()
        self.send_response(status, body.decode("latin-1").splitlines()[0] if self.site.echo else None)
        for name, value in {**(headers or {}), "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def content(self, data: bytes) -> None:
        site, start, end = self.site, 0, len(data)
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, site.etag, site.last_modified)
        if wanted and site.ranges and same:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(len(data), int(last) + 1 if last else len(data))
            if start >= len(data):
                self.plain(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        for name, value in {"ETag": site.etag, "Last-Modified": site.last_modified, **site.answer_headers}.items():
            if value is not None:
                self.send_header(name, value)
        if site.content_length:
            self.send_header("Content-Length", str(end - start))
        self.send_header("Connection", "close")
        self.end_headers()
        if site.cut_after_bytes:
            end = min(end, start + site.cut_after_bytes.pop(0))
        self.wfile.write(data[start:end])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def site() -> Iterator[Site]:
    """A web site on loopback."""
    site = Site()

    class Bound(Handler):
        pass

    Bound.site = site

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up is part of the game."""

    with Quiet(("127.0.0.1", 0), Bound) as server:
        site.address = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield site
        server.shutdown()
        thread.join()


MakeLoader = Callable[..., SourceWeightLoader]


@pytest.fixture
def make_loader(tmp_path: Path) -> MakeLoader:
    """make_loader(**WeightLoaderConfig fields, progress=, sha256=, limits=, access=)."""

    def make(**changes: Any) -> SourceWeightLoader:
        parts = {key: changes.pop(key) for key in ("progress", "sha256", "limits") if key in changes}
        access = changes.pop("access", Access(pause=lambda seconds: None))
        settings: dict[str, Any] = {
            "enable_caching": True,
            "cache_dir": str(tmp_path / "cache"),
            "max_cache_size": None,
            "max_concurrent_downloads": 4,
            "download_timeout_seconds": 20,
            "enable_integrity_checks": True,
            "default_headers": {},
        }
        config = WeightLoaderConfig(**{**settings, **changes})
        return SourceWeightLoader(config, NumpyTensorFactory(), access=access, **parts)

    return make


@pytest.fixture
def loader(make_loader: MakeLoader) -> SourceWeightLoader:
    return make_loader()


def make_spec(
    source: WeightSource,
    shape: Sequence[int],
    name: str = "w",
    dtype: DataType = DataType.FP32,
    steps: Sequence[TensorTransformation] = (),
) -> TensorSpec:
    return TensorSpec(name, list(shape), dtype, Device.CPU, source, list(steps))


def load_now(loader: SourceWeightLoader, spec: TensorSpec) -> np.ndarray:
    return np.asarray(asyncio.run(loader.load_tensor(spec)).to_numpy())


@pytest.fixture
def spec() -> Callable[..., TensorSpec]:
    """spec(source, shape, name="w", dtype=FP32, steps=())."""
    return make_spec


@pytest.fixture
def load() -> Callable[[SourceWeightLoader, TensorSpec], np.ndarray]:
    """load(loader, spec) -> the tensor as an array."""
    return load_now


@pytest.fixture
def values() -> np.ndarray:
    """A (64, 512) float32 matrix."""
    return VALUES


@pytest.fixture
def big() -> np.ndarray:
    """A (1024, 512) float32 matrix: more than one chunk of a download."""
    return BIG


@pytest.fixture
def safetensors() -> Callable[..., bytes]:
    """safetensors(name=array, ...) -> the file's bytes."""
    return lambda **tensors: save(tensors)


@pytest.fixture
def limits() -> type[Limits]:
    return Limits
