"""Models on other machines: a web server and an S3 store on loopback, and a hub's cache."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.builder.documents import read_document
from ferrum_ref.builder.places import place_of
from ferrum_ref.errors import ConfigError, FerrumError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.model_builder import BuildOptions
from ferrum_ref.interfaces.weights import WeightFormat, WeightLoader, WeightLoaderConfig, WeightMetadata, WeightSource
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelSource
from ferrum_ref.weights.loader import SourceWeightLoader
from ferrum_ref.weights.settings import Access


@dataclass
class Site:
    """A web server over a folder; what it was asked, and the header it wants."""

    address: str = ""
    folder: Path = Path()
    secret: str | None = None
    log: list[str] = field(default_factory=list)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(folder=tmp_path / "site")
    site.folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            site.log.append(self.path)
            if site.secret is not None and self.headers.get("X-Key") != site.secret:
                self.send_error(401)
                return
            self.path = self.path.partition("?")[0]
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    handler = functools.partial(Handler, directory=str(site.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture
def remote_loader(backend: Any, tmp_path: Path) -> Any:
    def make(access: Access | None = None) -> SourceWeightLoader:
        config = WeightLoaderConfig(True, str(tmp_path / "cache"), None, 2, 20, True, {})
        return SourceWeightLoader(config, backend.tensor_factory(), access=access)

    return make


def build(run: Any, builder: Any, backend: Any, loader: Any, source: ModelSource, **options: Any) -> Any:
    return run(builder.build_from_source(source, backend, loader, BuildOptions(**options)))


@pytest.mark.clause("MB-SOURCE-3", "MB-SOURCE-5")
@pytest.mark.parametrize("shards", [None, "12KB"])
def test_from_the_web(
    saved: Any, builder: Any, backend: Any, run: Any, site: Site, remote_loader: Any, prompt_logits: Any, shards: Any
) -> None:
    model = saved(1, shards)
    shutil.copytree(model.path, site.folder / "tiny")
    weights = "model.safetensors.index.json" if shards else "model.safetensors"
    site.secret = "k3y"
    for tail in ("tiny", "tiny/", "tiny/config.json", f"tiny/{weights}"):
        source = ModelSource.Url(f"{site.address}/{tail}?token=t0k", {"X-Key": "k3y"})
        executor = build(run, builder, backend, remote_loader(), source)
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    assert site.log
    assert all(path.endswith("?token=t0k") for path in site.log)
    graph = build(run, builder, backend, remote_loader(), source, optimization_level=1)
    assert model.error(prompt_logits(graph, model.ids)) <= model.bound


@pytest.mark.clause("MB-SOURCE-5")
def test_no_secret_is_told(saved: Any, builder: Any, backend: Any, run: Any, site: Site, remote_loader: Any) -> None:
    site.secret = "other"
    address = site.address.replace("http://", "http://user:passw0rd@")
    source = ModelSource.Url(f"{address}/tiny?token=t0k", {"X-Key": "k3y"})
    with pytest.raises(FerrumError) as caught:
        build(run, builder, backend, remote_loader(), source)
    place = place_of(source)
    told = f"{caught.value} {caught.value!r} {place.name} {place.portable}"
    assert not any(secret in told for secret in ("passw0rd", "t0k", "k3y", "user"))
    assert place.portable == {"Url": {"url": f"{site.address}/tiny", "headers": {}}}


@pytest.mark.clause("MB-SOURCE-5", "MB-SOURCE-2")
def test_a_web_place_that_lacks_something(
    saved: Any, builder: Any, backend: Any, run: Any, site: Site, remote_loader: Any
) -> None:
    source = ModelSource.Url(f"{site.address}/tiny", {})
    with pytest.raises(NotFoundError):
        build(run, builder, backend, remote_loader(), source)
    (site.folder / "tiny").mkdir()
    (site.folder / "tiny" / "config.json").write_bytes((saved(1).path / "config.json").read_bytes())
    with pytest.raises(NotFoundError, match="no weights there"):
        build(run, builder, backend, remote_loader(), source)
    (site.folder / "tiny" / "config.json").write_text("[1]")
    with pytest.raises(InvalidFormatError, match="JSON object"):
        build(run, builder, backend, remote_loader(), ModelSource.Url(f"{site.address}/tiny?again", {}))


@pytest.mark.clause("MB-SOURCE-5", "MB-SOURCE-7")
@pytest.mark.parametrize("address", ["", "tiny", "ftp://host/x", "http://", "http://[bad/x", "file:///etc"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="http"):
        place_of(ModelSource.Url(address, {}))


@pytest.mark.clause("MB-SOURCE-7")
def test_a_remote_gguf_file_is_refused() -> None:
    for source in (
        ModelSource.Url("https://host/models/tiny.gguf", {}),
        ModelSource.S3("bucket", "models/tiny.gguf", None, None),
    ):
        with pytest.raises(UnsupportedError, match="fetch it first"):
            place_of(source)


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Any, str]]:
    """(boto3 session, endpoint) of a store with one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    session = boto3.Session(aws_access_key_id="AKIAKEY1", aws_secret_access_key="s3cr3t", region_name="us-east-1")
    client = session.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="models")
    client.close()
    yield session, f"http://{host}:{port}"
    server.stop()


@pytest.mark.clause("MB-SOURCE-3", "MB-SOURCE-6")
@pytest.mark.parametrize("shards", [None, "12KB"])
def test_from_an_object_store(
    saved: Any, builder: Any, backend: Any, run: Any, s3: Any, remote_loader: Any, prompt_logits: Any, shards: Any
) -> None:
    model = saved(1, shards)
    session, endpoint = s3
    client = session.client("s3", endpoint_url=endpoint)
    prefix = f"team/tiny-{shards}"
    for path in model.path.iterdir():
        client.put_object(Bucket="models", Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    client.close()
    loader = remote_loader(Access(s3_session=session))
    weights = "model.safetensors.index.json" if shards else "model.safetensors"
    for key in (prefix, f"{prefix}/", f"{prefix}/config.json", f"{prefix}/{weights}"):
        source = ModelSource.S3("models", key, "us-east-1", endpoint)
        executor = build(run, builder, backend, loader, source)
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    assert str(executor.info().model_id) == f"s3://models/{prefix}"
    with pytest.raises(NotFoundError):
        build(run, builder, backend, loader, ModelSource.S3("models", "team/absent", "us-east-1", endpoint))


def hub_cache(folder: Path, model: Any, commit: str, revision: str) -> None:
    """The hub library's own layout, as a download leaves it."""
    repository = folder / "models--me--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(model.path, repository / "snapshots" / commit)


@pytest.mark.clause("MB-SOURCE-3", "MB-SOURCE-4")
def test_from_the_hub(
    saved: Any, builder: Any, backend: Any, run: Any, remote_loader: Any, prompt_logits: Any, tmp_path: Path
) -> None:
    """Two revisions of one repository in the hub's cache, without a network."""
    main, other = saved(1), saved(2, "12KB")
    hub_cache(tmp_path / "hub", main, "a" * 40, "main")
    hub_cache(tmp_path / "hub", other, "b" * 40, "v2")
    for model, revision in ((main, None), (main, "main"), (other, "v2")):
        source = ModelSource.HuggingFace("me/tiny", revision, str(tmp_path / "hub"))
        executor = build(run, builder, backend, remote_loader(), source)
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    assert str(executor.info().model_id) == "hf://me/tiny"
    with pytest.raises(FerrumError, match="me/absent"):
        build(run, builder, backend, remote_loader(), ModelSource.HuggingFace("me/absent", None, str(tmp_path / "hub")))


@pytest.mark.clause("MB-EXPORT-4", "MB-IMPORT-2")
def test_a_definition_finds_its_remote_weights(
    saved: Any, builder: Any, backend: Any, run: Any, site: Site, remote_loader: Any, prompt_logits: Any
) -> None:
    model = saved(1)
    shutil.copytree(model.path, site.folder / "tiny")
    definition = run(builder.export_model_definition(model.config()))
    definition.metadata.additional["source"] = dict(
        place_of(ModelSource.Url(f"{site.address}/tiny", {})).portable or {}
    )
    executor = run(builder.import_model_definition(definition, backend, remote_loader()))
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    assert any("model.safetensors" in path for path in site.log)


class OtherLoader(WeightLoader):
    """Somebody else's loader: it reads any file as one raw tensor, if it may."""

    def __init__(self, backend: Any, content: bytes, format: WeightFormat) -> None:
        self.backend, self.content, self.format = backend, content, format

    async def load_tensor(self, spec: Any) -> Any:
        assert (spec.shape, spec.dtype) == ([len(self.content)], DataType.UINT8)
        return self.backend.tensor_factory().from_numpy(np.frombuffer(self.content, np.uint8))

    async def load_tensors(self, specs: Any) -> Any:
        return [await self.load_tensor(spec) for spec in specs]

    async def is_available(self, source: Any) -> bool:
        return True

    async def get_metadata(self, source: Any) -> WeightMetadata:
        size = len(self.content)
        return WeightMetadata({"data": [size]}, self.format, size, [DataType.UINT8], {})

    async def preload(self, source: Any) -> None:
        return

    def capabilities(self) -> Any:
        return None


class ReadingLoader(OtherLoader):
    """One that hands out files as they are."""

    async def read_bytes(self, source: WeightSource) -> bytes:
        return b"as it is"


@pytest.mark.clause("MB-SOURCE-3")
def test_other_loaders(backend: Any, run: Any) -> None:
    source = WeightSource.Url("http://host/config.json", {})
    assert run(read_document(OtherLoader(backend, b'{"a": 1}', WeightFormat.Raw), source)) == b'{"a": 1}'
    assert run(read_document(ReadingLoader(backend, b"", WeightFormat.Raw), source)) == b"as it is"
    with pytest.raises(UnsupportedError, match="additional_options"):
        run(read_document(OtherLoader(backend, b"{}", WeightFormat.PyTorch), source))
