"""What a source is called: in messages, in the cache, and what lies beside it.  Clauses: WL-SECRET-1..2, WL-SHARD-2."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.formats.complaint import quoted
from ferrum_ref.interfaces.weights import WeightSource, WeightSourceType
from ferrum_ref.interfaces.weights_address import public_address

_SIGNATURE: Final = re.compile(
    r"(?i)x-(amz|goog)-|^(signature|sig|se|st|sp|sv|sr|expires|policy|key-pair-id|awsaccesskeyid)$"
)


def source_type(source: WeightSource) -> WeightSourceType:
    """The tag.  Raises UnsupportedError for what is no source."""
    for kind in WeightSourceType:
        if isinstance(source, getattr(WeightSource, kind.value)):
            return kind
    raise UnsupportedError(f"load: source: got {type(source).__name__}, expected File, Url, HuggingFace, Memory or S3")


def public_name(source: WeightSource) -> str:
    """The source as it may stand in a message; also its name in the table of checksums.  [WL-SECRET-1]

    A path; scheme://host/path; hf://repo/file@revision; s3://bucket/key; "memory".  Pure.
    """
    if isinstance(source, WeightSource.File):
        return source.path
    if isinstance(source, WeightSource.Url):
        return public_address(source.url)
    if isinstance(source, WeightSource.HuggingFace):
        return f"hf://{source.repo_id}/{source.filename}@{source.revision or 'main'}"
    if isinstance(source, WeightSource.S3):
        return f"s3://{source.bucket}/{source.key}"
    return "memory"


def file_name(source: WeightSource) -> str:
    """The last part of the source's name: what says the format where the content does not."""
    if isinstance(source, WeightSource.Url):
        return PurePosixPath(urlsplit(source.url).path).name
    return PurePosixPath(public_name(source).rpartition("@")[0] or public_name(source)).name


def cache_key(source: WeightSource) -> str:
    """One name per content: the address without the parts that only sign it.  Not reversible.  [WL-CACHE-1]"""
    if isinstance(source, WeightSource.Url):
        parts = urlsplit(source.url)
        query = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not _SIGNATURE.search(pair[0])]
        identity = repr((parts.scheme, parts.hostname, parts.port, parts.path, query))
    elif isinstance(source, WeightSource.S3):
        identity = repr((public_name(source), source.region, source.endpoint))
    else:
        identity = public_name(source)
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()


def sibling(source: WeightSource, name: str) -> WeightSource:
    """The file `name` beside the source's.  [WL-SHARD-2]

    Raises InvalidFormatError unless `name` is a plain file name; UnsupportedError for bytes in memory.
    """
    where = public_name(source)
    if not is_plain_name(name):
        raise InvalidFormatError(f"load {where}: shard: got {quoted(name)}, expected a plain file name")
    if isinstance(source, WeightSource.File):
        return replace(source, path=str(Path(source.path).parent / name))
    if isinstance(source, WeightSource.Url):
        parts = urlsplit(source.url)
        path = f"{parts.path.rpartition('/')[0]}/{name}"
        return replace(source, url=urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))
    if isinstance(source, WeightSource.HuggingFace):
        return replace(source, filename=str(PurePosixPath(source.filename).parent / name))
    if isinstance(source, WeightSource.S3):
        folder, slash, _ = source.key.rpartition("/")
        return replace(source, key=f"{folder}{slash}{name}")
    raise UnsupportedError(f"load {where}: got an index of shards in memory, expected the tensors themselves")


def is_plain_name(name: object) -> bool:
    """True for a file name without any path in it.  Pure."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and name.isprintable()
        and not any(mark in name for mark in '/\\:?#%*"<>|')
    )
