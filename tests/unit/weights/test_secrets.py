"""No credential in an error, its traceback, a log record or a repr, whatever goes wrong."""

from __future__ import annotations

import asyncio
import base64
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.weights import WeightFormat, WeightLoaderConfig, WeightSource
from ferrum_ref.interfaces.weights_address import public_address
from ferrum_ref.weights.progress import LoadProgress
from ferrum_ref.weights.settings import Access
from ferrum_ref.weights.sources.names import cache_key, public_name

Make = Callable[..., Any]
USER, PASSWORD, SIGNATURE, TOKEN = "user-S1", "pa55-S2", "5ig-S3", "hf_t0ken-S4"
KEY_ID, KEY, SESSION, HEADER = "AKIAS5S5S5", "k3y-S6", "s355ion-S7", "h3ader-S8"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = (USER, PASSWORD, SIGNATURE, TOKEN, KEY_ID, KEY, SESSION, HEADER, BASIC)


def shown(*texts: object) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret not in str(text), f"{secret} in {text}"


def address(rest: str) -> str:
    return f"http://{USER}:{PASSWORD}@{rest}?X-Amz-Signature={SIGNATURE}&token={TOKEN}#sha256={'0' * 64}"


@pytest.fixture
def steps() -> list[LoadProgress]:
    return []


@pytest.fixture
def leaky(make_loader: Make, steps: list[LoadProgress], limits: Make) -> Any:
    """A loader that holds every kind of credential."""
    session = boto3.Session(KEY_ID, KEY, SESSION, region_name="us-east-1")
    access = Access(
        proxies={}, s3_session=session, hub_token=TOKEN, hub_endpoint="http://127.0.0.1:9", pause=lambda seconds: None
    )
    return make_loader(
        default_headers={"Authorization": HEADER}, access=access, progress=steps.append, limits=limits(max_resumes=1)
    )


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that this project logs, and other libraries from INFO on."""
    with caplog.at_level(logging.INFO), caplog.at_level(logging.DEBUG, logger="ferrum_ref"):
        yield caplog


def fails(loader: Any, spec: Any, logs: pytest.LogCaptureFixture) -> None:
    """The load fails with a FerrumError that shows nothing, in any of its forms; so do the other methods."""
    for call in (loader.load_tensor(spec), loader.get_metadata(spec.source), loader.preload(spec.source)):
        with pytest.raises(FerrumError) as caught:
            asyncio.run(call)
        error = caught.value
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        shown(error, repr(error), error.message, error.__cause__, *lines)
    asyncio.run(loader.is_available(spec.source))
    shown(logs.text, repr(spec), repr(loader), repr(loader._fetcher), repr(loader._fetcher._access))


SITUATIONS: dict[str, Callable[[Any], str]] = {
    "absent": lambda site: address(f"{site.address}/absent.npy"),
    "refused": lambda site: site.statuses.extend([401] * 9) or address(f"{site.address}/w.npy"),
    "forbidden": lambda site: site.statuses.extend([403] * 9) or address(f"{site.address}/w.npy"),
    "odd": lambda site: site.statuses.extend([418] * 9) or address(f"{site.address}/w.npy"),
    "busy": lambda site: site.statuses.extend([503] * 99) or address(f"{site.address}/w.npy"),
    "cut": lambda site: site.cut_after_bytes.extend([0] * 99) or address(f"{site.address}/w.npy"),
    "not npy": lambda site: address(f"{site.address}/broken.npy"),
    "no format": lambda site: address(f"{site.address}/unknown"),
    "redirect loop": lambda site: address(f"{site.address}/loop"),
    "redirect": lambda site: address(f"{site.address}/away"),
    "nobody": lambda site: address("127.0.0.1:9/w.npy"),
    "no host": lambda site: address("/w.npy"),
    "port": lambda site: address("host:99999/w.npy"),
    "port text": lambda site: f"http://{USER}:{PASSWORD}@host:{PASSWORD}/w.npy",
    "bracket": lambda site: address("[::1/w.npy"),
    "scheme": lambda site: address("host/x").replace("http", "ftp", 1),
    "space": lambda site: address("host/w x.npy"),
    "newline": lambda site: address("host/w\nx.npy"),
    "unicode": lambda site: address("ho\u2100st/w.npy"),
    "at": lambda site: f"http://{USER}:{PASSWORD}@{USER}@host\\@/w.npy?{SIGNATURE}",
    "no scheme": lambda site: f"{USER}:{PASSWORD}@host/w.npy",
    "index": lambda site: address(f"{site.address}/model.safetensors.index.json"),
    "bad index": lambda site: address(f"{site.address}/bad.safetensors.index.json"),
}


@pytest.mark.clause("WL-SECRET-1", "WL-SECRET-2")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_url_errors_show_nothing(
    situation: str, site: Any, leaky: Any, spec: Make, steps: list[LoadProgress], all_logs: pytest.LogCaptureFixture
) -> None:
    site.echo = True  # the server quotes the request in its refusals
    site.files.update({"broken.npy": b"\x93NUMPY\x01\x00" + b"x" * 99, "unknown": b"?" * 99, "w.npy": b"x" * 500})
    site.files["model.safetensors.index.json"] = b'{"weight_map": {"w": "absent.safetensors"}}'
    site.files["bad.safetensors.index.json"] = b'{"weight_map": {"w": "../absent"}}'
    site.redirects = {"loop": f"/loop?sig={SIGNATURE}", "away": f"ftp://{USER}:{PASSWORD}@host/?sig={SIGNATURE}"}
    source = WeightSource.Url(SITUATIONS[situation](site), {"X-Key": HEADER})
    fails(leaky, spec(source, (1,)), all_logs)
    shown(*steps)


@pytest.mark.clause("WL-SECRET-2")
@pytest.mark.parametrize(
    "headers",
    [{"X-Key": f"{HEADER}\r\nX: 1"}, {f"X {HEADER}": "1"}, {"X-Key": f"{HEADER}\x00"}, {"X-Key": f"\u2100{HEADER}"}],
    ids=["newline", "name", "nul", "unicode"],
)
def test_headers_that_cannot_be_sent(
    headers: dict[str, str], site: Any, leaky: Any, spec: Make, all_logs: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FerrumError) as caught:
        asyncio.run(leaky.load_tensor(spec(WeightSource.Url(site.url("w.npy"), headers), (1,))))
    shown(caught.value, *traceback.format_exception(caught.value))


@pytest.mark.clause("WL-SECRET-1", "WL-SECRET-2")
@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9",
        f"http://{USER}:{PASSWORD}@127.0.0.1:9",
        f"http://127.0.0.1:9?token={TOKEN}",
        f"http://host:{PASSWORD}",
        f"{USER}:{PASSWORD}@host",
        None,
    ],
)
def test_s3_errors_show_nothing(
    endpoint: str | None, site: Any, leaky: Any, spec: Make, all_logs: pytest.LogCaptureFixture
) -> None:
    """A store that quotes the request's headers, the signature among them, in its refusals."""
    site.echo, site.statuses = True, [403, 400, 401, 501] * 40
    where = f"http://{site.address}" if endpoint is None else endpoint
    fails(leaky, spec(WeightSource.S3("bucket", "w.npy", "us-east-1", where), (1,)), all_logs)


@pytest.mark.clause("WL-SECRET-2", "WL-HUB-3")
def test_hub_errors_show_nothing(
    leaky: Any, spec: Make, monkeypatch: pytest.MonkeyPatch, all_logs: pytest.LogCaptureFixture
) -> None:
    """Whatever the library says in its errors, a signed address for instance, stays there."""
    import huggingface_hub
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def broken(*_: Any, **__: Any) -> str:
        raise RuntimeError(f"403 for https://cdn/x?X-Amz-Signature={SIGNATURE} with Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    fails(leaky, spec(WeightSource.HuggingFace("me/m", "w.npy", None, None), (1,)), all_logs)


@pytest.mark.clause("WL-SECRET-1", "WL-DATA-1")
def test_what_may_be_shown() -> None:
    full = address("host.example:8080/a/w.npy")
    assert public_address(full) == "http://host.example:8080/a/w.npy?..."
    source = WeightSource.Url(full, {"Authorization": HEADER})
    assert public_name(source) == "http://host.example:8080/a/w.npy?..."
    assert repr(source) == "UrlWeights(url='http://host.example:8080/a/w.npy?...', headers=['Authorization'])"
    bucket = WeightSource.S3("b", "k", None, f"http://{USER}:{PASSWORD}@host")
    assert repr(bucket) == "S3Weights(bucket='b', key='k', region=None, endpoint='http://host')"
    config = WeightLoaderConfig(True, None, None, 1, 1, True, {"Authorization": HEADER})
    memory = WeightSource.Memory(PASSWORD.encode(), WeightFormat.Raw)
    shown(repr(source), repr(bucket), repr(config), repr(memory), cache_key(source))
    for odd in (f"http://[{PASSWORD}", f"{USER}:{PASSWORD}@h", "", f"http://{USER}:{PASSWORD}@h:{PASSWORD}/", None):
        shown(public_address(odd))  # type: ignore[arg-type]
