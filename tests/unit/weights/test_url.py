"""Weights over HTTP from a real server on loopback: ranges, cut connections, refusals, limits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    AuthError,
    FerrumTimeoutError,
    InvalidFormatError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.weights import WeightSource
from ferrum_ref.weights.settings import Access

Make = Callable[..., Any]


def url(site: Any, path: str = "w.safetensors", **headers: str) -> WeightSource:
    return WeightSource.Url(site.url(path), headers)


@pytest.mark.clause("WL-FETCH-1", "WL-PROGRESS-1")
def test_downloads_and_reports(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, big: Any
) -> None:
    content = site.files["w.safetensors"] = safetensors(w=big)
    steps: list[Any] = []
    loader = make_loader(progress=steps.append)
    np.testing.assert_array_equal(load(loader, spec(url(site), big.shape)), big)
    sizes = [step.num_bytes for step in steps]
    assert sizes == sorted(sizes)
    assert len(sizes) > 1
    assert sizes[-1] == len(content)
    assert {step.total_bytes for step in steps} == {len(content)}
    assert {step.source for step in steps} == {site.url("w.safetensors")}


@pytest.mark.clause("WL-FETCH-2")
@pytest.mark.parametrize("validator", ["etag", "last_modified"])
def test_resumes_a_cut_connection_with_range(
    validator: str, site: Any, loader: Any, spec: Make, load: Make, safetensors: Make, big: Any
) -> None:
    """The rest, and only the rest, is asked for, of the same version: as the server's log says."""
    content = site.files["w.safetensors"] = safetensors(w=big)
    site.etag = None
    name = {"etag": '"v1"', "last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}[validator]
    setattr(site, validator, name)
    site.cut_after_bytes = [700_001, 300_000, 0]
    np.testing.assert_array_equal(load(loader, spec(url(site), big.shape)), big)
    asked = [(seen.headers.get("Range"), seen.headers.get("If-Range")) for seen in site.log]
    assert asked == [
        (None, None),
        ("bytes=700001-", name),
        ("bytes=1000001-", name),
        ("bytes=1000001-", name),
    ]
    assert len(content) > 1_000_001


@pytest.mark.clause("WL-FETCH-2", "WL-FETCH-3")
@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_starts_over_when_the_version_cannot_be_named(
    etag: str | None, site: Any, loader: Any, spec: Make, load: Make, safetensors: Make, big: Any
) -> None:
    site.files["w.safetensors"] = safetensors(w=big)
    site.etag, site.cut_after_bytes = etag, [700_001]
    np.testing.assert_array_equal(load(loader, spec(url(site), big.shape)), big)
    assert [seen.headers.get("Range") for seen in site.log] == [None, None]


@pytest.mark.clause("WL-FETCH-3")
def test_content_that_changes_under_way_is_not_mixed(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, big: Any
) -> None:
    """The first half of one version and the second of another would load without a complaint."""
    other = big + 1
    site.files["w.safetensors"], site.cut_after_bytes = safetensors(w=big), [1_000_000]

    def change(_: float) -> None:
        site.files["w.safetensors"], site.etag = safetensors(w=other), '"v2"'

    loader = make_loader(access=Access(pause=change))
    np.testing.assert_array_equal(load(loader, spec(url(site), big.shape)), other)
    assert site.log[1].headers["If-Range"] == '"v1"'


@pytest.mark.clause("WL-FETCH-4")
def test_gives_up_without_progress(site: Any, make_loader: Make, spec: Make, load: Make, limits: Make) -> None:
    site.files["w.safetensors"] = b"x" * 1000
    site.cut_after_bytes = [0] * 50
    waits: list[float] = []
    loader = make_loader(limits=limits(max_resumes=3), access=Access(pause=waits.append))
    with pytest.raises(NetworkError, match="ended at byte 0 of 1000; got no further in 4 attempts"):
        load(loader, spec(url(site), (1,)))
    assert len(site.log) == 4
    assert waits == sorted(waits)
    assert len(waits) == 3


@pytest.mark.clause("WL-FETCH-4")
@pytest.mark.parametrize("status", [429, 500, 503])
def test_tries_again_when_the_server_is_busy(
    status: int, site: Any, loader: Any, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    site.files["w.safetensors"], site.statuses = safetensors(w=values), [status, status]
    np.testing.assert_array_equal(load(loader, spec(url(site), values.shape)), values)
    assert len(site.log) == 3


@pytest.mark.clause("WL-FETCH-5")
@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFoundError), (410, NotFoundError), (401, AuthError), (403, PermissionDeniedError), (418, NetworkError)],
)
def test_refusals(status: int, kind: type[Exception], site: Any, loader: Any, spec: Make, load: Make) -> None:
    site.files["w.safetensors"], site.statuses = b"", [status] * 20
    with pytest.raises(kind):
        load(loader, spec(url(site), (1,)))
    assert len(site.log) == 1


@pytest.mark.clause("WL-FETCH-5")
def test_nobody_there(make_loader: Make, spec: Make, load: Make, site: Any, limits: Make) -> None:
    loader = make_loader(limits=limits(max_resumes=1))
    with pytest.raises(NetworkError, match="exchange failed"):
        load(loader, spec(WeightSource.Url("http://127.0.0.1:9/w.npy", {}), (1,)))


@pytest.mark.clause("WL-FETCH-6")
def test_the_deadline_holds(site: Any, make_loader: Make, spec: Make, load: Make) -> None:
    """A server that always breaks off ends in Timeout when the clock runs out, not in endless attempts."""
    site.files["w.safetensors"] = b"x" * 1000
    site.cut_after_bytes = [1] * 900
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += 4.0

    loader = make_loader(access=Access(clock=lambda: now[0], pause=pause))
    with pytest.raises(FerrumTimeoutError, match="within 20 s; raise download_timeout_seconds"):
        load(loader, spec(url(site), (1,)))
    assert len(site.log) == 5


@pytest.mark.clause("WL-FETCH-6")
def test_a_silent_server_times_out(site: Any, make_loader: Make, spec: Make, load: Make) -> None:
    import threading

    site.files["w.safetensors"], site.gate = b"x", threading.Event()
    loader = make_loader(download_timeout_seconds=1)
    with pytest.raises(FerrumTimeoutError):
        load(loader, spec(url(site), (1,)))
    site.gate.set()


@pytest.mark.clause("WL-FETCH-3")
def test_a_length_that_nobody_gives(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    """Without Content-Length a cut looks like the end: only a given checksum makes that download safe."""
    content = site.files["w.safetensors"] = safetensors(w=values)
    site.content_length = False
    with pytest.raises(NetworkError, match="no Content-Length"):
        load(make_loader(), spec(url(site), values.shape))
    loader = make_loader(sha256={site.url("w.safetensors"): hashlib.sha256(content).hexdigest()})
    np.testing.assert_array_equal(load(loader, spec(url(site), values.shape)), values)


@pytest.mark.clause("WL-HASH-1", "WL-HASH-2")
def test_checksums(site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any) -> None:
    content = site.files["w.safetensors"] = safetensors(w=values)
    right, wrong = hashlib.sha256(content).hexdigest(), "0" * 64
    good = WeightSource.Url(site.url(f"w.safetensors#sha256={right.upper()}"), {})
    bad = WeightSource.Url(site.url(f"w.safetensors#sha256={wrong}"), {})
    np.testing.assert_array_equal(load(make_loader(), spec(good, values.shape)), values)
    with pytest.raises(InvalidFormatError, match=f"sha256: got {right}, expected {wrong}"):
        load(make_loader(), spec(bad, values.shape))
    loader = make_loader(sha256={site.url("w.safetensors"): wrong})
    with pytest.raises(InvalidFormatError, match="sha256"):
        load(loader, spec(url(site), values.shape))
    assert not list((loader._fetcher._cache.directory).glob("*.part"))
    with pytest.raises(InvalidParameterError, match="64 hex digits"):
        load(make_loader(sha256={site.url("w.safetensors"): "abc"}), spec(url(site), values.shape))
    unchecked = make_loader(sha256={site.url("w.safetensors"): wrong}, enable_integrity_checks=False)
    np.testing.assert_array_equal(load(unchecked, spec(url(site), values.shape)), values)


@pytest.mark.clause("WL-LIMIT-2")
def test_too_large_is_refused_before_it_is_fetched(
    site: Any, make_loader: Make, spec: Make, load: Make, limits: Make, safetensors: Make, big: Any
) -> None:
    content = site.files["w.safetensors"] = safetensors(w=big)
    steps: list[Any] = []
    loader = make_loader(limits=limits(max_download_bytes=1_000_000), progress=steps.append)
    with pytest.raises(ResourceExhaustedError, match=f"got {len(content)} bytes, expected at most 1000000"):
        load(loader, spec(url(site), big.shape))
    assert steps == []
    site.content_length = False
    checked = make_loader(
        limits=limits(max_download_bytes=1_000_000),
        progress=steps.append,
        sha256={site.url("w.safetensors"): "0" * 64},
    )
    with pytest.raises(ResourceExhaustedError):
        load(checked, spec(url(site), big.shape))
    assert steps[-1].num_bytes <= 1_000_000


@pytest.mark.clause("WL-META-2", "WL-META-1")
def test_metadata_by_ranges_only(site: Any, loader: Any, safetensors: Make, big: Any) -> None:
    content = site.files["w.safetensors"] = safetensors(w=big, b=np.zeros((3,), np.float16))
    found = asyncio.run(loader.get_metadata(url(site)))
    assert found.tensors == {"b": [3], "w": [1024, 512]}
    assert found.total_size_bytes == big.nbytes + 6
    assert [seen.headers.get("Range") for seen in site.log] == ["bytes=0-65535"]
    assert len(content) > 10 * 65536


@pytest.mark.clause("WL-META-2")
def test_metadata_from_a_server_without_ranges(site: Any, loader: Any, safetensors: Make, values: Any) -> None:
    site.files["w.safetensors"], site.ranges = safetensors(w=values), False
    assert asyncio.run(loader.get_metadata(url(site))).tensors == {"w": [64, 512]}


@pytest.mark.clause("WL-LOAD-6")
def test_availability(site: Any, loader: Any) -> None:
    site.files.update({"w.safetensors": b"x" * 100_000, "empty": b""})
    assert asyncio.run(loader.is_available(url(site)))
    assert site.log[0].headers["Range"] == "bytes=0-0"
    assert asyncio.run(loader.is_available(url(site, "empty")))
    assert not asyncio.run(loader.is_available(url(site, "absent")))
    for address in ("ftp://host/x", "http://", "", "http://[::1", "http://127.0.0.1:9/x", "http://h:99999/x"):
        assert not asyncio.run(loader.is_available(WeightSource.Url(address, {})))


@pytest.mark.clause("WL-FETCH-5")
@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("ftp://host/w.npy", UnsupportedError),
        ("file:///etc/passwd", InvalidParameterError),
        ("http:///w.npy", InvalidParameterError),
        ("http://ho st/w.npy", InvalidParameterError),
        ("http://host:99999/w.npy", InvalidParameterError),
        ("http://host/ü.npy", InvalidParameterError),
    ],
)
def test_addresses_that_are_none(address: str, kind: type[Exception], loader: Any, spec: Make, load: Make) -> None:
    with pytest.raises(kind):
        load(loader, spec(WeightSource.Url(address, {}), (1,)))


@pytest.mark.clause("WL-FETCH-5")
@pytest.mark.parametrize(
    ("headers", "message"),
    [({"Content-Encoding": "gzip"}, "encoded body"), ({"Content-Range": "bytes x"}, None)],
)
def test_odd_answers(
    headers: dict[str, str], message: str | None, site: Any, loader: Any, spec: Make, load: Make, safetensors: Make
) -> None:
    site.files["w.safetensors"], site.answer_headers = safetensors(w=np.ones(2, np.float32)), headers
    if message is None:
        assert load(loader, spec(url(site), (2,))).tolist() == [1, 1]
        return
    with pytest.raises(NetworkError, match=message):
        load(loader, spec(url(site), (2,)))


@pytest.mark.clause("WL-SECRET-3")
def test_redirects_carry_credentials_only_to_the_same_origin(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    """127.0.0.1 and localhost are one server here, but two origins."""
    site.files["w.safetensors"] = safetensors(w=values)
    port = site.address.rpartition(":")[2]
    site.redirects = {"near": "/w.safetensors", "far": f"http://localhost:{port}/w.safetensors?sig=abc"}
    loader = make_loader(default_headers={"X-Api-Key": "key-1"})
    for path, kept in (("near", True), ("far", False)):
        site.log.clear()
        found = load(loader, spec(url(site, path, Authorization="Bearer t-1"), values.shape))
        np.testing.assert_array_equal(found, values)
        first, second = site.log
        assert (first.headers["Authorization"], first.headers["X-Api-Key"]) == ("Bearer t-1", "key-1")
        assert ("Authorization" in second.headers, "X-Api-Key" in second.headers) == (kept, kept)


@pytest.mark.clause("WL-SECRET-3")
def test_redirects_that_lead_nowhere(site: Any, loader: Any, spec: Make, load: Make) -> None:
    site.redirects = {"loop": "/loop", "file": "file:///etc/passwd", "none": ""}
    for path in site.redirects:
        with pytest.raises(NetworkError, match="redirect"):
            load(loader, spec(url(site, path), (1,)))


@pytest.mark.clause("WL-SECRET-3")
def test_user_and_password_become_a_header(
    site: Any, make_loader: Make, spec: Make, load: Make, safetensors: Make, values: Any
) -> None:
    site.files["w.safetensors"], site.secret = safetensors(w=values), "Basic dXNlcjpwQHNz"  # user:p@ss
    source = WeightSource.Url(f"http://user:p%40ss@{site.address}/w.safetensors", {})
    np.testing.assert_array_equal(load(make_loader(), spec(source, values.shape)), values)
    own = replace(source, headers={"Authorization": "other"})
    with pytest.raises(AuthError):
        load(make_loader(cache_dir=None, enable_caching=False), spec(own, values.shape))
