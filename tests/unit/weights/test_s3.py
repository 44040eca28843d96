"""Weights from a store that speaks S3 over HTTP on loopback (moto's server), through a proxy that can cut."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.config import Config

from ferrum_ref.errors import (
    AuthError,
    InvalidFormatError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.weights import WeightSource
from ferrum_ref.weights.settings import Access
from ferrum_ref.weights.sources.s3 import _checksum

Make = Callable[..., Any]
BUCKET = "weights"


@dataclass
class Store:
    """The store's address through the proxy, what went through, and how the proxy misbehaves."""

    endpoint: str
    session: Any
    client: Any
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut_after_bytes: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    tamper: bool = False

    def source(self, key: str, bucket: str = BUCKET) -> WeightSource:
        return WeightSource.S3(bucket, key, "us-east-1", self.endpoint)

    @property
    def access(self) -> Access:
        return Access(s3_session=self.session, pause=lambda seconds: None)


@pytest.fixture(scope="module")
def s3_address() -> Iterator[tuple[str, int]]:
    """A moto server of its own for this file."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="module")
def s3_client(s3_address: tuple[str, int]) -> Iterator[tuple[Any, Any]]:
    """A session with credentials, and a client that goes past the proxy."""
    session = boto3.Session(aws_access_key_id="AKIAKEY1", aws_secret_access_key="s3cr3t", region_name="us-east-1")
    plain = Config(request_checksum_calculation="when_required")
    client = session.client("s3", endpoint_url=f"http://{s3_address[0]}:{s3_address[1]}", config=plain)
    client.create_bucket(Bucket=BUCKET)
    yield session, client
    client.close()


@pytest.fixture
def store(s3_address: tuple[str, int], s3_client: tuple[Any, Any]) -> Iterator[Store]:
    """The store behind a forwarding proxy."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            store.log.append((self.command, self.path, dict(self.headers.items())))
            if store.statuses:
                self.send_response(store.statuses.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(*s3_address)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            if store.tamper:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if store.cut_after_bytes and self.command == "GET":
                data = data[: store.cut_after_bytes.pop(0)]
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = forward

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        store = Store(f"http://127.0.0.1:{server.server_address[1]}", *s3_client)
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield store
        server.shutdown()
        thread.join()


def put(store: Store, key: str, content: bytes, **options: Any) -> None:
    store.client.put_object(Bucket=BUCKET, Key=key, Body=content, **options)


@pytest.mark.clause("WL-S3-1")
def test_loads_an_object(
    store: Store, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    put(store, "models/tiny/w.safetensors", safetensors(w=values))
    loader = make_loader(access=store.access)
    source = store.source("models/tiny/w.safetensors")
    assert asyncio.run(loader.is_available(source))
    assert not asyncio.run(loader.is_available(store.source("models/absent")))
    np.testing.assert_array_equal(load(loader, spec(source, values.shape)), values)
    assert asyncio.run(loader.get_metadata(source)).tensors == {"w": [64, 512]}


@pytest.mark.clause("WL-S3-1", "WL-FETCH-2")
def test_resumes_with_range_and_if_match(
    store: Store, make_loader: Make, spec: Make, load: Make, safetensors: Make, big: Any
) -> None:
    content = safetensors(w=big)
    put(store, "w.safetensors", content)
    store.cut_after_bytes = [700_001, 300_000]
    found = load(make_loader(access=store.access), spec(store.source("w.safetensors"), big.shape))
    np.testing.assert_array_equal(found, big)
    tag = f'"{hashlib.md5(content).hexdigest()}"'
    asked = [(headers.get("Range"), headers.get("If-Match")) for _, _, headers in store.log]
    assert asked == [(None, None), ("bytes=700001-", tag), ("bytes=1000001-", tag)]


@pytest.mark.clause("WL-S3-1", "WL-FETCH-3")
def test_an_object_that_changes_under_way(
    store: Store, make_loader: Make, spec: Make, load: Make, safetensors: Make, big: Any
) -> None:
    put(store, "w.safetensors", safetensors(w=big))
    store.cut_after_bytes = [1_000_000]
    other = big + 1
    access = Access(s3_session=store.session, pause=lambda seconds: put(store, "w.safetensors", safetensors(w=other)))
    found = load(make_loader(access=access), spec(store.source("w.safetensors"), big.shape))
    np.testing.assert_array_equal(found, other)


@pytest.mark.clause("WL-S3-2", "WL-HASH-2")
@pytest.mark.parametrize("algorithm", [None, "SHA256", "CRC32"])
def test_the_stores_own_checksum_is_compared(
    algorithm: str | None, store: Store, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    put(store, "w.safetensors", safetensors(w=values), **({"ChecksumAlgorithm": algorithm} if algorithm else {}))
    store.tamper = True
    with pytest.raises(InvalidFormatError, match=r"md5: got \w+, expected" if algorithm is None else "checksum"):
        load(make_loader(access=store.access), spec(store.source("w.safetensors"), values.shape))
    unchecked = make_loader(access=store.access, enable_integrity_checks=False)
    if algorithm is None:
        assert load(unchecked, spec(store.source("w.safetensors"), values.shape)).shape == values.shape


@pytest.mark.clause("WL-HASH-1", "WL-HASH-2")
def test_a_wrong_checksum_is_refused(
    store: Store, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    put(store, "w.safetensors", safetensors(w=values))
    loader = make_loader(access=store.access, sha256={f"s3://{BUCKET}/w.safetensors": "1" * 64})
    with pytest.raises(InvalidFormatError, match="sha256: got"):
        load(loader, spec(store.source("w.safetensors"), values.shape))


@pytest.mark.clause("WL-META-2")
def test_metadata_by_ranges(store: Store, make_loader: Make, safetensors: Make, big: Any) -> None:
    put(store, "w.safetensors", safetensors(w=big))
    found = asyncio.run(make_loader(access=store.access).get_metadata(store.source("w.safetensors")))
    assert found.tensors == {"w": [1024, 512]}
    assert [headers.get("Range") for _, _, headers in store.log] == ["bytes=0-65535"]


@pytest.mark.clause("WL-S3-3")
@pytest.mark.parametrize(
    ("statuses", "kind"),
    [([403], PermissionDeniedError), ([401], AuthError), ([400], NetworkError), ([], NotFoundError)],
)
def test_refusals(
    statuses: list[int], kind: type[Exception], store: Store, make_loader: Make, spec: Make, load: Make
) -> None:
    store.statuses = statuses
    with pytest.raises(kind, match=f"s3://{BUCKET}/absent.npy"):
        load(make_loader(access=store.access), spec(store.source("absent.npy"), (1,)))


@pytest.mark.clause("WL-S3-3", "WL-FETCH-4")
def test_a_busy_store_is_asked_again(
    store: Store, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    put(store, "w.safetensors", safetensors(w=values))
    store.statuses = [503, 500]
    found = load(make_loader(access=store.access), spec(store.source("w.safetensors"), values.shape))
    np.testing.assert_array_equal(found, values)


@pytest.mark.clause("WL-S3-3")
@pytest.mark.parametrize(
    "source",
    [
        WeightSource.S3(BUCKET, "k", None, "ftp://host"),
        WeightSource.S3(BUCKET, "k", None, "http://user:password@host"),
        WeightSource.S3(BUCKET, "k", None, "http://[::1"),
        WeightSource.S3("a bucket that cannot be", "k", "us-east-1", None),
        WeightSource.S3(BUCKET, "", "us-east-1", None),
        WeightSource.S3(BUCKET, "k", "no region\n", None),
    ],
    ids=["scheme", "userinfo", "address", "bucket", "key", "region"],
)
def test_names_that_s3_cannot_have(
    source: WeightSource, store: Store, make_loader: Make, spec: Make, load: Make
) -> None:
    with pytest.raises(InvalidParameterError):
        load(make_loader(access=store.access), spec(source, (1,)))


@pytest.mark.clause("WL-S3-3")
def test_no_credentials(
    make_loader: Make, spec: Make, load: Make, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(AuthError, match="set them up for boto3"):
        load(make_loader(), spec(store.source("k.npy"), (1,)))


@pytest.mark.clause("WL-S3-3")
def test_without_boto3(make_loader: Make, spec: Make, load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'ferrum-ref\[s3\]'"):
        load(make_loader(), spec(WeightSource.S3("b", "k.npy", None, None), (1,)))


@pytest.mark.clause("WL-S3-2")
def test_which_checksums_count() -> None:
    """A composite or encrypted object's tag is no MD5 of the content."""
    tag = "d41d8cd98f00b204e9800998ecf8427e"
    assert _checksum({"ETag": f'"{tag}"'}) == ("md5", tag)
    assert _checksum({"ETag": f'"{tag}-3"'}) is None
    assert _checksum({"ETag": f'"{tag}"', "ServerSideEncryption": "aws:kms"}) is None
    assert _checksum({"ETag": f'"{tag}"', "ServerSideEncryption": "AES256"}) == ("md5", tag)
    empty = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
    assert _checksum({"ChecksumSHA256": empty}) == ("sha256", hashlib.sha256(b"").hexdigest())
    assert _checksum({"ChecksumSHA256": empty, "ChecksumType": "COMPOSITE", "ETag": f'"{tag}-3"'}) is None
