"""Where a model's files are: a ModelSource as a function from a file's name to the source of its bytes.

Clauses: MB-SOURCE-1..6 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from ferrum_ref.builder.documents import read_document
from ferrum_ref.builder.reading import StoredWeights
from ferrum_ref.errors import ConfigError, NotFoundError, UnsupportedError
from ferrum_ref.formats.json_file import parse_json_object, read_json_object
from ferrum_ref.interfaces.weights import WeightLoader, WeightSource
from ferrum_ref.types.models import ModelSource

CONFIG: Final = "config.json"
WEIGHT_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WEIGHT_ENDINGS: Final = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A place that holds a model's files.

    name: how messages call it, without anything secret; file: the source of a file by name; weights: the one weight
    file, if the source named it; directory: where it is on this machine, if it is; gguf: a GGUF file, which has its own
    names and carries its own configuration.
    """

    name: str
    file: Callable[[str], WeightSource]
    weights: str | None = None
    directory: Path | None = None
    gguf: Path | None = None
    portable: Mapping[str, Any] | None = None

    async def read_config(self, loader: WeightLoader | None) -> dict[str, Any]:
        """The model's config.json.  [MB-SOURCE-1]

        Raises NotFoundError, InvalidFormatError, FerrumIOError, NetworkError.
        """
        if self.directory is not None:
            return read_json_object(self.directory / CONFIG)
        if loader is None:
            raise NotFoundError(f"build {self.name}: {CONFIG} lies on another machine; got no loader to fetch it")
        return parse_json_object(await read_document(loader, self.file(CONFIG)), f"{self.name}/{CONFIG}")

    async def find_weights(self, loader: WeightLoader) -> StoredWeights:
        """The tensors of the first weight file that is there.  [MB-SOURCE-2]

        Raises NotFoundError if there is none, and what the loader raises.
        """
        for name in (self.weights,) if self.weights else WEIGHT_FILES:
            source = self.file(name)
            if await loader.is_available(source):
                metadata = await loader.get_metadata(source)
                shapes = {tensor: tuple(shape) for tensor, shape in metadata.tensors.items()}
                return StoredWeights(self.name, dict.fromkeys(shapes, source), shapes)
        looked_for = self.weights or ", ".join(WEIGHT_FILES)
        raise NotFoundError(f"build {self.name}: got no weights there; looked for {looked_for}")


def place_of(source: ModelSource) -> ModelPlace:
    """The place of a source; reads nothing but the local directory. Pure.  [MB-SOURCE-1..6]

    Raises NotFoundError (no such path), ConfigError (an address that is none), UnsupportedError (a remote GGUF file).
    """
    match source:
        case ModelSource.Local(path):
            return _local(path)
        case ModelSource.HuggingFace(repo_id, revision, cache_dir):
            portable = {"HuggingFace": {"repo_id": repo_id, "revision": revision, "cache_dir": cache_dir}}
            return ModelPlace(
                f"hf://{repo_id}", lambda name: WeightSource.HuggingFace(repo_id, name, revision, cache_dir),
                portable=portable,
            )  # fmt: skip
        case ModelSource.Url(url, headers):
            return _url(url, headers)
        case ModelSource.S3(bucket, key, region, endpoint):
            folder, weights = _split(key)
            prefix = f"{folder}/" if folder else ""
            portable = {"S3": {"bucket": bucket, "key": key, "region": region, "endpoint": endpoint}}
            return ModelPlace(
                f"s3://{bucket}/{folder}", lambda name: WeightSource.S3(bucket, prefix + name, region, endpoint),
                weights, portable=portable,
            )  # fmt: skip
    raise ConfigError(f"build: source: got {type(source).__name__}, expected Local, HuggingFace, Url or S3")


def _local(path: str) -> ModelPlace:
    try:
        found = Path(path)
        is_there, is_directory = bool(path) and found.exists(), found.is_dir()
    except (OSError, ValueError):
        is_there = is_directory = False
    if not is_there:
        raise NotFoundError(f"build {path!r:.200}: got no such file or directory")
    portable = {"Local": path}
    if found.suffix == ".gguf":
        return ModelPlace(str(found), lambda name: WeightSource.File(name, None), gguf=found, portable=portable)
    if is_directory and not (found / CONFIG).exists():
        files = sorted(found.glob("*.gguf"))
        if len(files) == 1:
            return ModelPlace(str(found), lambda name: WeightSource.File(name, None), gguf=files[0], portable=portable)
    directory = found if is_directory else found.parent
    return ModelPlace(
        str(found), lambda name: WeightSource.File(str(directory / name), None),
        None if is_directory else found.name, directory, portable=portable,
    )  # fmt: skip


def _url(url: str, headers: Mapping[str, str]) -> ModelPlace:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ConfigError("build: Url: got no http(s) address")
    folder, weights = _split(parts.path)

    def file(name: str) -> WeightSource:
        address = urlunsplit((parts.scheme, parts.netloc, f"{folder}/{name}", parts.query, ""))
        return WeightSource.Url(address, dict(headers))

    # No header, query or password goes into a definition: they may be secrets.
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return ModelPlace(f"{parts.scheme}://{host}{folder}", file, weights, portable={"Url": {"url": bare, "headers": {}}})


def _split(path: str) -> tuple[str, str | None]:
    """(folder, weight file) of a key or path that names a folder, its config.json, or a weight file in it."""
    last = PurePosixPath(path).name
    if last.endswith(".gguf"):
        raise UnsupportedError(f"build: got the remote GGUF file {last!r:.80}; fetch it first and build from its path")
    if last.endswith(_WEIGHT_ENDINGS):
        return path[: -len(last)].rstrip("/"), last
    if last == CONFIG:
        return path[: -len(last)].rstrip("/"), None
    return path.rstrip("/"), None
