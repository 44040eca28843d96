"""Gets files that lie elsewhere: out of the cache, or over the network once for all who wait.

Clauses: WL-CACHE-1..5, WL-LOAD-9, WL-LIMIT-2, WL-HUB-1..2.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from ferrum_ref.errors import InvalidFormatError, NetworkError, ResourceExhaustedError
from ferrum_ref.interfaces.weights import WeightLoaderConfig, WeightSource
from ferrum_ref.weights.cache import WeightCache
from ferrum_ref.weights.download import Download
from ferrum_ref.weights.integrity import expected_sha256, require_sha256, sha256_of
from ferrum_ref.weights.progress import ProgressCallback
from ferrum_ref.weights.settings import Access, Deadline, Limits
from ferrum_ref.weights.single_flight import SingleFlight
from ferrum_ref.weights.sources.hugging_face import HubFile
from ferrum_ref.weights.sources.names import cache_key, file_name, public_name
from ferrum_ref.weights.sources.remote import Interruption, Remote
from ferrum_ref.weights.sources.s3 import S3Clients, S3Remote
from ferrum_ref.weights.sources.url import UrlRemote


class Fetcher:
    """The network side of one loader.  Safe for use by several threads."""

    def __init__(
        self,
        config: WeightLoaderConfig,
        limits: Limits,
        access: Access,
        sha256: Mapping[str, str],
        progress: ProgressCallback,
    ) -> None:
        self._config, self._limits, self._access = config, limits, access
        self._sha256, self._progress = sha256, progress
        folder = Path(config.cache_dir) if config.cache_dir is not None else default_cache_dir()
        self._cache = WeightCache(folder, config.max_cache_size, config.enable_integrity_checks)
        self._hub_folder = folder / "hub" if config.cache_dir is not None else None
        self._hub_verified: set[tuple[str, int, int]] = set()
        self._s3_clients = S3Clients(access, config.download_timeout_seconds)
        self._slots = threading.BoundedSemaphore(config.max_concurrent_downloads)
        self._flights: SingleFlight[Path | None] = SingleFlight()

    def deadline(self) -> Deadline:
        """One download's time, from now on."""
        return Deadline(self._config.download_timeout_seconds, self._access.clock)

    def is_kept(self, source: WeightSource) -> bool:
        """True when the file is in the cache, the loader's or the hub's."""
        if not self._config.enable_caching:
            return False
        if isinstance(source, WeightSource.HuggingFace):
            return HubFile(source, self._access).is_cached(self._hub_folder)
        return self._cache.find(cache_key(source), self._expected(source)) is not None

    def fetch(self, source: WeightSource) -> Path | None:
        """The file in the cache, fetched if it is not there; None when it is larger than the cache may be."""
        return self._flights.run(cache_key(source), lambda: self._fetch(source))

    def fetch_into(self, source: WeightSource, folder: Path) -> Path:
        """The file under `folder`, past the cache."""
        with self._slots:
            if isinstance(source, WeightSource.HuggingFace):
                return self._from_hub(source, folder)
            target = folder / "content"
            self._download(source, target)
            return target

    def small(self, source: WeightSource, limit_bytes: int) -> bytes:
        """A small file's content, for instance an index.  Raises ResourceExhaustedError beyond the limit."""
        path = self.fetch(source) if self._config.enable_caching else None
        if path is not None:
            return _read_small(path, source, limit_bytes)
        with tempfile.TemporaryDirectory(prefix="ferrum-weights-") as folder:
            return _read_small(self.fetch_into(source, Path(folder)), source, limit_bytes)

    @contextlib.contextmanager
    def remote(self, source: WeightSource) -> Iterator[Remote]:
        """The file for reading in ranges; closed at the end."""
        if isinstance(source, WeightSource.Url):
            remote: Remote = UrlRemote(source.url, self._headers(source.headers), self._access.proxies)
        elif isinstance(source, WeightSource.S3):
            remote = S3Remote(source, self._s3_clients)
        else:
            remote = HubFile(source, self._access).remote()
        try:
            yield remote
        finally:
            remote.close()

    def is_available(self, source: WeightSource) -> bool:
        """One cheap question, at most ten seconds of waiting.  Raises whatever goes wrong."""
        deadline = Deadline(min(10.0, self._config.download_timeout_seconds), self._access.clock)
        if isinstance(source, WeightSource.HuggingFace):
            return HubFile(source, self._access).is_available(deadline, self._hub_folder)
        if self.is_kept(source):
            return True
        with self.remote(source) as remote:
            try:
                remote.open_range(0, 1, deadline).close()
            except Interruption as failure:
                return "416" in str(failure)  # an empty file has no first byte, but it is there
        return True

    def _fetch(self, source: WeightSource) -> Path | None:
        with self._slots:
            if isinstance(source, WeightSource.HuggingFace):
                return self._from_hub(source, self._hub_folder)
            key = cache_key(source)
            kept = self._cache.find(key, self._expected(source))
            if kept is not None:
                return kept
            partial = self._cache.partial()
            try:
                sha256, num_bytes = self._download(source, partial)
                if not self._cache.fits(num_bytes):
                    return None
                return self._cache.keep(key, partial, public_name(source), sha256)
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, source: WeightSource, target: Path) -> tuple[str, int]:
        deadline = self.deadline()
        with self.remote(source) as remote:
            transfer = Download(remote, self._limits, self._access, deadline, self._progress)
            done = transfer.run(target, self._expected(source), self._config.enable_integrity_checks)
        return done.sha256, done.num_bytes

    def _from_hub(self, source: WeightSource, folder: Path | None) -> Path:
        """Through the hub's own cache; a file that is not what the hub promised is fetched once more.  [WL-HUB-2]"""
        file = HubFile(source, self._access)
        path, promised = file.download(folder)
        if not self._config.enable_integrity_checks:
            return path
        try:
            self._check_hub_file(source, path, promised)
        except InvalidFormatError:
            path, promised = file.download(folder, force=True)
            self._check_hub_file(source, path, promised)
        return path

    def _check_hub_file(self, source: WeightSource, path: Path, promised: str | None) -> None:
        status = path.stat()
        version = (str(path), status.st_size, status.st_mtime_ns)
        expected = self._expected(source) or promised
        if expected is not None and version not in self._hub_verified:
            require_sha256(public_name(source), sha256_of(path), expected)
            self._hub_verified.add(version)

    def _expected(self, source: WeightSource) -> str | None:
        return expected_sha256(source, self._sha256) if self._config.enable_integrity_checks else None

    def _headers(self, own: Mapping[str, str]) -> dict[str, str]:
        """The loader's headers and the source's own, which win whatever their case."""
        names = {name.lower() for name in own}
        defaults = self._config.default_headers
        return {**{name: value for name, value in defaults.items() if name.lower() not in names}, **own}


def default_cache_dir() -> Path:
    """~/.cache/ferrum-ref/weights; the configuration's cache_dir replaces it."""
    return Path.home() / ".cache" / "ferrum-ref" / "weights"


def _read_small(path: Path, source: WeightSource, limit_bytes: int) -> bytes:
    size = path.stat().st_size
    if size > limit_bytes:
        raise ResourceExhaustedError(f"load {public_name(source)}: got {size} bytes, expected at most {limit_bytes}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise NetworkError(f"load {file_name(source)}: {error.strerror or error}") from None
