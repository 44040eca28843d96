"""The per-user store of downloaded models: locks, checksums, and files that appear whole or not at all.

    <cache>/models/<name>/<file>            a finished model
    <cache>/models/<name>/<file>.verified   its checksum, size and time of change, written last
    <cache>/models/<name>/.partial/         downloads under way; kept after a failure, removed after success
    <cache>/models/<name>/.lock             held while one process pulls

Clauses: MD-PULL-2..4 (specs/model_files.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

_CHUNK_BYTES: Final = 1 << 20
_LOCK_POLL_S: Final = 0.2


def default_cache_dir() -> Path:
    """~/.cache/ferrum-ref; the command line adds --cache-dir and its environment variables on top."""
    return Path.home() / ".cache" / "ferrum-ref"


def sha256_of(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The file's SHA-256 in hex; `advance` hears of every chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def is_verified(path: Path, sha256: str) -> bool:
    """True when the marker beside `path` vouches for this checksum and the file has not changed since.  [MD-PULL-3]"""
    try:
        marker = json.loads(_marker(path).read_text("utf-8"))
        status = path.stat()
    except (OSError, ValueError):
        return False
    return bool(marker == {"sha256": sha256, "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns})


def mark_verified(path: Path, sha256: str) -> None:
    """Record that `path` has this checksum; the caller has just computed it.  [MD-PULL-3]"""
    status = path.stat()
    record = {"sha256": sha256, "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    partial = path.with_name(path.name + ".verified.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        _sync(file)
    os.replace(partial, _marker(path))


def install(partial: Path, path: Path, sha256: str) -> None:
    """Move a checked download to its place: flushed to disk, renamed, then marked.  [MD-PULL-2]"""
    with partial.open("rb+") as file:
        _sync(file)
    _marker(path).unlink(missing_ok=True)
    os.replace(partial, path)
    mark_verified(path, sha256)


def copy_hashed(source: IO[bytes], target: Path, limit_bytes: int, advance: Callable[[int], None]) -> str:
    """Copy at most `limit_bytes` of a stream into `target` and return the SHA-256 of what was written."""
    digest, left = hashlib.sha256(), limit_bytes
    with target.open("wb") as file:
        while left and (chunk := source.read(min(_CHUNK_BYTES, left))):
            file.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
            advance(len(chunk))
        _sync(file)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the directory's lock; a dead holder's is free.  `on_wait` is called once if it is taken.  [MD-PULL-4]"""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+b") as file:
        told = False
        while not _try_lock(file):
            if not told:
                on_wait()
                told = True
            time.sleep(_LOCK_POLL_S)
        yield  # closing the file releases the lock


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _sync(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
