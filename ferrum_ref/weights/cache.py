"""Downloaded files, kept up to a number of bytes; the longest unused go first.

    <directory>/<key>.weights   the content
    <directory>/<key>.json      {"sha256", "num_bytes", "name"}; its time of change is the time of last use
    <directory>/.<random>.part  a download under way

A file appears under its name only when it is complete.  Clauses: WL-CACHE-1..5.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from pathlib import Path
from typing import Any, Final

from ferrum_ref.errors import FerrumIOError
from ferrum_ref.weights.integrity import sha256_of

_CONTENT: Final = ".weights"
_RECORD: Final = ".json"


class WeightCache:
    """One directory of downloads.  Safe for use by several threads and processes."""

    def __init__(self, directory: Path, max_bytes: int | None, verify: bool) -> None:
        self.directory = directory
        self._max_bytes, self._verify = max_bytes, verify
        self._lock = threading.Lock()
        self._verified: dict[Path, tuple[int, int]] = {}

    def find(self, key: str, sha256: str | None) -> Path | None:
        """The kept file, if it is whole and, when one is given, has this checksum.  [WL-CACHE-2..3]

        With integrity checks its SHA-256 is compared with the recorded one, once per loader and version of the file;
        a file that does not match is removed, so that it is fetched again.
        """
        content, record = self._paths(key)
        facts = _read_record(record)
        if facts is None or not content.is_file():
            return None
        if (sha256 is not None and facts["sha256"] != sha256) or not self._is_whole(content, facts):
            self.remove(key)
            return None
        self._touch(record)
        return content

    def partial(self) -> Path:
        """A new name for a download under way.  Raises FerrumIOError when the directory cannot be made."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FerrumIOError(f"weight cache {self.directory}: {error.strerror or error}") from None
        return self.directory / f".{secrets.token_hex(8)}.part"

    def keep(self, key: str, partial: Path, name: str, sha256: str) -> Path:
        """Move a finished download to its place, record it, and make room.  [WL-CACHE-1, WL-CACHE-4]"""
        content, record = self._paths(key)
        facts = {"sha256": sha256, "num_bytes": partial.stat().st_size, "name": name}
        try:
            _sync(partial)
            with self._lock:
                record.unlink(missing_ok=True)  # a record never vouches for a content it does not describe
                os.replace(partial, content)
                staged = self.partial()
                staged.write_text(json.dumps(facts), encoding="utf-8")
                os.replace(staged, record)
                self._verified[content] = _version(content)
        except OSError as error:
            raise FerrumIOError(f"weight cache {self.directory}: {error.strerror or error}") from None
        self._touch(record)
        self._evict(key)
        return content

    def remove(self, key: str) -> None:
        """Forget an entry."""
        for path in reversed(self._paths(key)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def num_bytes(self) -> int:
        """Bytes of all kept files."""
        return sum(size for _, size, _ in self._entries())

    def fits(self, num_bytes: int) -> bool:
        """True when a file of this size may be kept at all."""
        return self._max_bytes is None or num_bytes <= self._max_bytes

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.directory / (key + _CONTENT), self.directory / (key + _RECORD)

    def _is_whole(self, content: Path, facts: dict[str, Any]) -> bool:
        try:
            version = _version(content)
            if version[1] != facts["num_bytes"]:
                return False
            if not self._verify or self._verified.get(content) == version:
                return True
            if sha256_of(content) != facts["sha256"]:
                return False
        except (OSError, FerrumIOError):
            return False
        self._verified[content] = version
        return True

    def _touch(self, record: Path) -> None:
        """Make this entry the last used one, also where the clock is coarse."""
        with self._lock, contextlib.suppress(OSError):
            os.utime(record)
            newest = max((used for used, _, key in self._entries() if key + _RECORD != record.name), default=0)
            if record.stat().st_mtime_ns <= newest:
                os.utime(record, ns=(newest + 1, newest + 1))

    def _entries(self) -> list[tuple[int, int, str]]:
        """(last use, bytes, key) of every entry, the longest unused first."""
        found = []
        for record in self.directory.glob("*" + _RECORD):
            with contextlib.suppress(OSError):
                key = record.name.removesuffix(_RECORD)
                found.append((record.stat().st_mtime_ns, self._paths(key)[0].stat().st_size, key))
        return sorted(found)

    def _evict(self, newest: str) -> None:
        """Remove the longest unused until the rest fits; readers keep the files they hold open.  [WL-CACHE-4]"""
        if self._max_bytes is None:
            return
        with self._lock:
            entries = self._entries()
            total = sum(size for _, size, _ in entries)
            for _, size, key in entries:
                if total <= self._max_bytes:
                    return
                if key != newest:
                    self.remove(key)
                    total -= size


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    sound = isinstance(facts, dict) and isinstance(facts.get("sha256"), str) and isinstance(facts.get("num_bytes"), int)
    return facts if sound else None


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
