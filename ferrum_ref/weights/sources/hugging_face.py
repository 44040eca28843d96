"""A file of the Hugging Face hub, through huggingface_hub (extra `hub`) and its cache.  Clauses: WL-HUB-1..3."""

from __future__ import annotations

import inspect
import re
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ferrum_ref.errors import (
    FerrumError,
    FerrumIOError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from ferrum_ref.weights.settings import Access, Deadline
from ferrum_ref.weights.sources.names import public_name
from ferrum_ref.weights.sources.url import UrlRemote

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MISSING: Final = ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError")
_OFFLINE: Final = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout")


class HubFile:
    """One file of a repository at a revision."""

    def __init__(self, source: Any, access: Access) -> None:
        """Raises UnsupportedError without huggingface_hub, InvalidParameterError for a path out of the repository."""
        self.name = public_name(source)
        self._source, self._access = source, access
        parts = PurePosixPath(source.filename).parts
        plain = bool(parts) and ".." not in parts and not PurePosixPath(source.filename).is_absolute()
        if not plain or any(mark in source.filename for mark in "\\\x00:?#"):
            raise InvalidParameterError(f"fetch {self.name}: filename: expected a path inside the repository")
        try:
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.utils
        except ImportError:
            raise UnsupportedError(
                f"fetch {self.name}: the huggingface_hub package is not installed; pip install 'ferrum-ref[hub]'"
            ) from None
        self._hub: Any = huggingface_hub

    def download(self, folder: Path | None, force: bool = False) -> tuple[Path, str | None]:
        """The file in the hub's cache, and the SHA-256 that the hub gives for it, if it gives one.  [WL-HUB-1..2]"""
        source = self._source
        quiet: dict[str, Any] = {}
        if "tqdm_class" in inspect.signature(self._hub.hf_hub_download).parameters:
            quiet["tqdm_class"] = _silent_bar()
        try:
            found = self._hub.hf_hub_download(
                source.repo_id,
                source.filename,
                revision=source.revision,
                cache_dir=source.cache_dir or folder,
                force_download=force,
                endpoint=self._access.hub_endpoint,
                token=self._access.hub_token,
                **quiet,
            )
            blob = Path(found).resolve().name
        except Exception as error:  # noqa: BLE001  the library's own tree is wide; all of it is translated
            raise _translated(self.name, error) from None
        return Path(found), blob if _SHA256.fullmatch(blob) else None

    def remote(self) -> UrlRemote:
        """The same file for reading in ranges.  Raises NetworkError when the hub is switched off (HF_HUB_OFFLINE)."""
        if self._hub.constants.HF_HUB_OFFLINE:
            raise NetworkError(f"fetch {self.name}: got no cached file, and the hub is switched off by HF_HUB_OFFLINE")
        source, endpoint = self._source, self._access.hub_endpoint
        try:
            url = self._hub.hf_hub_url(source.repo_id, source.filename, revision=source.revision, endpoint=endpoint)
            headers = self._hub.utils.build_hf_headers(token=self._access.hub_token)
        except Exception as error:  # noqa: BLE001  as above
            raise _translated(self.name, error) from None
        remote = UrlRemote(url, headers, self._access.proxies)
        remote.name = self.name
        return remote

    def is_cached(self, folder: Path | None) -> bool:
        """True when the hub's cache has it."""
        source = self._source
        found = self._hub.try_to_load_from_cache(
            source.repo_id, source.filename, cache_dir=source.cache_dir or folder, revision=source.revision
        )
        return isinstance(found, str)

    def is_available(self, deadline: Deadline, folder: Path | None) -> bool:
        """True when the hub's cache has the file, or the hub answers for it."""
        if self.is_cached(folder):
            return True
        remote = self.remote()
        try:
            remote.open_range(0, 1, deadline).close()
            return True
        finally:
            remote.close()


def _translated(name: str, error: Exception) -> FerrumError:
    """The library's error by its class; its text may quote signed addresses and is not passed on.  [WL-HUB-3]"""
    if isinstance(error, FerrumError):
        return error
    kinds = [each.__name__ for each in type(error).__mro__]
    kind = kinds[0]
    if "GatedRepoError" in kinds or "DisabledRepoError" in kinds:
        return PermissionDeniedError(f"fetch {name}: got a gated repository, expected a token that may read it")
    if any(each in kinds for each in _OFFLINE):
        return NetworkError(f"fetch {name}: got no answer from the hub and no cached file ({kind})")
    if any(each in kinds for each in _MISSING):
        return NotFoundError(f"fetch {name}: got no such repository, revision or file ({kind})")
    if "HFValidationError" in kinds:
        return InvalidParameterError(f"fetch {name}: repo_id: got something else, expected owner/name")
    if isinstance(error, OSError) and error.errno is not None:
        return FerrumIOError(f"fetch {name}: {error.strerror}")
    return NetworkError(f"fetch {name}: the hub's answer failed ({kind})")


def _silent_bar() -> type:
    """A progress bar that draws nothing: the library never prints."""
    from tqdm.std import tqdm  # type: ignore[import-untyped, unused-ignore]

    class SilentBar(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar
