"""SHA-256 of files, and the checksums that a caller gives.  Clauses: WL-HASH-1..3."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, InvalidParameterError
from ferrum_ref.interfaces.weights import WeightSource
from ferrum_ref.weights.sources.names import public_name

_CHUNK_BYTES: Final = 1 << 20
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex.  Raises FerrumIOError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise FerrumIOError(f"read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def expected_sha256(source: WeightSource, given: Mapping[str, str]) -> str | None:
    """The checksum for `source`: under its public name in `given`, or a URL's fragment `#sha256=...`.  [WL-HASH-1]

    Raises InvalidParameterError for what is no SHA-256.
    """
    name = public_name(source)
    found = given.get(name)
    if found is None and isinstance(source, WeightSource.Url):
        fragment = urlsplit(source.url).fragment
        found = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
    if found is not None and not _SHA256.fullmatch(found.lower()):
        raise InvalidParameterError(f"load {name}: sha256: got {len(found)} characters, expected 64 hex digits")
    return None if found is None else found.lower()


def require_sha256(name: str, found: str, expected: str | None) -> None:
    """Raises InvalidFormatError when the bytes are not those that were promised.  [WL-HASH-2]"""
    if expected is not None and found != expected:
        raise InvalidFormatError(f"load {name}: sha256: got {found}, expected {expected}; the content was dropped")
