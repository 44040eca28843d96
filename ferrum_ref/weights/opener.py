"""From a source to an open container: fetched if need be, checked, kept, shards found.

Clauses: WL-OPEN-1..2, WL-OPEN-4..5, WL-CACHE-1..5, WL-HASH-1..3, WL-META-2.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ferrum_ref.errors import (
    FerrumError,
    FerrumIOError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.formats.byte_source import ByteSource, FileBytes, MemoryBytes
from ferrum_ref.formats.json_file import parse_json_object
from ferrum_ref.interfaces.weights import WeightFormat, WeightLoaderConfig, WeightSource
from ferrum_ref.weights.containers import Container
from ferrum_ref.weights.detect import format_of, open_container
from ferrum_ref.weights.fetcher import Fetcher
from ferrum_ref.weights.gptq import GptqContainer, GptqSettings, gptq_settings, packed_layers
from ferrum_ref.weights.integrity import expected_sha256, require_sha256, sha256_of
from ferrum_ref.weights.sharded import ShardedContainer
from ferrum_ref.weights.single_flight import SingleFlight
from ferrum_ref.weights.sources.names import cache_key, file_name, public_name, sibling, source_type
from ferrum_ref.weights.sources.remote import RangedBytes
from ferrum_ref.weights.sources.url import split_address

_INDEX: Final = ".index.json"
_MAX_INDEX_BYTES: Final = 64 * 2**20
_OPEN_FILES: Final = 8
_IN_DIRECTORY: Final = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SELF_DESCRIBING: Final = (WeightFormat.SafeTensors, WeightFormat.Numpy, WeightFormat.PyTorch)


class Opener:
    """Opens sources for one loader.  Safe for use by several threads."""

    def __init__(self, config: WeightLoaderConfig, fetcher: Fetcher, sha256: Mapping[str, str]) -> None:
        self._config, self._fetcher, self._sha256 = config, fetcher, sha256
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[object, ...], Container] = OrderedDict()
        self._flights: SingleFlight[Container] = SingleFlight()

    def open(self, source: WeightSource) -> Container:
        """The source's tensors, ready to be read.  [WL-OPEN-1..2, WL-OPEN-4..5]

        Raises NotFoundError, UnsupportedError, FerrumIOError, NetworkError, FerrumTimeoutError, InvalidFormatError,
        ResourceExhaustedError.
        """
        source = self._resolved(source)
        if isinstance(source, WeightSource.Memory):
            return self._quantized(source, open_container(MemoryBytes(source.data), source.format, None))
        if file_name(source).endswith(_INDEX):
            return self._quantized(source, self._sharded(source, self.open))
        return self._quantized(source, self._whole(source))

    def open_header(self, source: WeightSource) -> Container:
        """As `open`, but of a file behind a network only what describes the tensors, where that can be had.

        For `tensors()` and `extra()` only.  [WL-META-2]
        """
        source = self._resolved(source)
        if isinstance(source, (WeightSource.File, WeightSource.Memory)) or self._fetcher.is_kept(source):
            return self.open(source)
        if file_name(source).endswith(_INDEX):
            return self._quantized(source, self._sharded(source, self.open_header))
        ranged = self._ranged(source)
        return self.open(source) if ranged is None else self._quantized(source, ranged)

    def preload(self, source: WeightSource) -> None:
        """Fetch everything the source needs into the cache.  Raises what `open` raises.  [WL-LOAD-7]"""
        source = self._resolved(source)
        if isinstance(source, (WeightSource.File, WeightSource.Memory)):
            self.open(source)
            return
        if not self._config.enable_caching:
            raise UnsupportedError(f"preload {public_name(source)}: caching is off; set enable_caching")
        is_index = file_name(source).endswith(_INDEX)
        names = self._sharded(source, self.open).shards if is_index else ()
        for each in [sibling(source, name) for name in names] or [source]:
            if self._fetcher.fetch(each) is None:
                raise ResourceExhaustedError(
                    f"preload {public_name(each)}: got a file larger than the cache may be; raise max_cache_size"
                )

    def _resolved(self, source: WeightSource) -> WeightSource:
        """A directory stands for the checkpoint in it.  [WL-OPEN-2]"""
        source_type(source)
        if isinstance(source, WeightSource.Url):
            split_address(source.url)
        if not isinstance(source, WeightSource.File):
            return source
        try:
            path = Path(source.path)
            if not path.is_dir():
                return source
            name = next((name for name in _IN_DIRECTORY if (path / name).is_file()), None)
        except (OSError, ValueError) as error:
            raise FerrumIOError(f"load {source.path!a:.200}: {type(error).__name__}") from None
        if name is None:
            raise NotFoundError(f"load {source.path}: got a directory without any of {', '.join(_IN_DIRECTORY)}")
        return WeightSource.File(str(path / name), source.tensor_name)

    def _whole(self, source: WeightSource) -> Container:
        if isinstance(source, WeightSource.File):
            return self._from_file(source, Path(source.path), str(source.path))
        return self._flights.run(cache_key(source), lambda: self._fetched(source))

    def _fetched(self, source: WeightSource) -> Container:
        """A remote file: in the cache, or in a file without a name that lives as long as the container."""
        if self._config.enable_caching:
            path = self._fetcher.fetch(source)
            if path is not None:
                return self._from_file(source, path, public_name(source))
        with tempfile.TemporaryDirectory(prefix="ferrum-weights-", ignore_cleanup_errors=True) as folder:
            path = self._fetcher.fetch_into(source, Path(folder))
            return _container(FileBytes(path, public_name(source)), source, None)

    def _from_file(self, source: WeightSource, path: Path, name: str) -> Container:
        """A file of this machine; the last few stay open, as long as they do not change.  [WL-OPEN-4]"""
        file = FileBytes(path, name)
        status = path.stat()
        version = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            if version in self._open:
                self._open.move_to_end(version)
                return self._open[version]
        if isinstance(source, WeightSource.File) and self._config.enable_integrity_checks:
            expected = expected_sha256(source, self._sha256)
            if expected is not None:
                require_sha256(name, sha256_of(path), expected)
        container = _container(file, source, path.parent if isinstance(source, WeightSource.File) else None)
        with self._lock:
            self._open[version] = container
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return container

    def _ranged(self, source: WeightSource) -> Container | None:
        """The description of a remote file, or None when it cannot be had in ranges."""
        with self._fetcher.remote(source) as remote:
            try:
                file = RangedBytes(remote, self._fetcher.deadline())
            except NetworkError:
                return None
            kind = format_of(file, file_name(source))
            legacy = kind == WeightFormat.PyTorch and file.read(0, min(2, file.size)) != b"PK"
            if kind not in _SELF_DESCRIBING or legacy:
                return None
            return open_container(file, kind, None)

    def _index(self, source: WeightSource) -> Mapping[str, object]:
        name = public_name(source)
        if isinstance(source, WeightSource.File):
            file: ByteSource = FileBytes(Path(source.path), name)
        else:
            file = MemoryBytes(self._fetcher.small(source, _MAX_INDEX_BYTES), name)
        if file.size > _MAX_INDEX_BYTES:
            raise UnsupportedError(
                f"load {name}: got an index of {file.size} bytes, expected at most {_MAX_INDEX_BYTES}"
            )
        return parse_json_object(file.read(0, file.size), name)

    def _sharded(self, source: WeightSource, open_one: Callable[[WeightSource], Container]) -> ShardedContainer:
        """The shards beside the index.  [WL-SHARD-1..3]"""
        kind = WeightFormat.SafeTensors if "safetensors" in file_name(source) else WeightFormat.PyTorch
        name = public_name(source)
        return ShardedContainer(name, self._index(source), kind, lambda shard: open_one(sibling(source, shard)))

    def _quantized(self, source: WeightSource, container: Container) -> Container:
        """GPTQ's packed layers get their plain weights, by the settings beside the file.  [WL-GPTQ-3..4]"""
        if isinstance(container, GptqContainer) or not packed_layers(container.names()):
            return container
        try:
            settings = self._gptq_settings(source)
        except UnsupportedError:
            return container  # another method: its parts can be had as they are stored
        return GptqContainer(container, settings)

    def _gptq_settings(self, source: WeightSource) -> GptqSettings:
        if isinstance(source, WeightSource.Memory):
            return GptqSettings()
        for name, key in (("quantize_config.json", None), ("config.json", "quantization_config")):
            beside = sibling(source, name)
            try:
                found = self._index(beside)
            except (NotFoundError, PermissionDeniedError):
                continue
            if key is None or key in found:
                return gptq_settings(found, public_name(beside))
        return GptqSettings()


class SharedOpener:
    """Opens each source once for all tensors of one call."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._open: dict[str, Container] = {}
        self._flights: SingleFlight[Container] = SingleFlight()

    def open(self, source: WeightSource) -> Container:
        """As `Opener.open`."""
        if isinstance(source, WeightSource.Url):
            split_address(source.url)
        key = f"{id(source.data)} {source.format}" if isinstance(source, WeightSource.Memory) else cache_key(source)
        return self._flights.run(key, lambda: self._opened(key, source))

    def _opened(self, key: str, source: WeightSource) -> Container:
        if key not in self._open:
            self._open[key] = self._opener.open(source)
        return self._open[key]


def _container(file: ByteSource, source: WeightSource, directory: Path | None) -> Container:
    try:
        return open_container(file, format_of(file, file_name(source)), directory)
    except FerrumError:
        file.close()
        raise
