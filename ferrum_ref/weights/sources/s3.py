"""An object of an S3 store, through boto3 (extra `s3`).  Clauses: WL-S3-1..3, WL-SECRET-2."""

from __future__ import annotations

import base64
import binascii
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from ferrum_ref.errors import (
    AuthError,
    FerrumError,
    InvalidFormatError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from ferrum_ref.weights.settings import Access, Deadline
from ferrum_ref.weights.sources.names import public_name
from ferrum_ref.weights.sources.remote import CHUNK_BYTES, Body, Interruption, Remote

_LONGEST_WAIT_S: Final = 30.0
_MD5_TAG: Final = re.compile(r'"?([0-9a-f]{32})"?')
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19})")
_DENIED: Final = ("AccessDenied", "AllAccessDisabled", "Forbidden")
_BAD_KEYS: Final = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "Unauthorized")
_MISSING: Final = ("NoSuchKey", "NoSuchBucket", "NotFound")


class S3Clients:
    """boto3 clients of one loader, one per region and endpoint; their connections close with this object."""

    def __init__(self, access: Access, timeout_s: float) -> None:
        self._access, self._timeout_s = access, timeout_s
        self._lock = threading.Lock()
        self._clients: dict[tuple[str | None, str | None], Any] = {}

    def get(self, name: str, region: str | None, endpoint: str | None) -> Any:
        """Raises UnsupportedError without boto3; InvalidParameterError for an endpoint or region that cannot be."""
        with self._lock:
            if (region, endpoint) not in self._clients:
                self._clients[region, endpoint] = client = self._make(name, region, endpoint)
                weakref.finalize(self, client.close)
            return self._clients[region, endpoint]

    def _make(self, name: str, region: str | None, endpoint: str | None) -> Any:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError:
            raise UnsupportedError(
                f"fetch {name}: the boto3 package is not installed; pip install 'ferrum-ref[s3]'"
            ) from None
        _check_endpoint(name, endpoint)
        wait_s = min(self._timeout_s, _LONGEST_WAIT_S)
        config = Config(connect_timeout=wait_s, read_timeout=wait_s, retries={"total_max_attempts": 1})
        session = self._access.s3_session if self._access.s3_session is not None else boto3.Session()
        try:
            return session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
        except (BotoCoreError, ValueError) as error:
            raise _translated(name, error) from None


class S3Remote(Remote):
    """One object; its ETag names the version of the content."""

    def __init__(self, source: Any, clients: S3Clients) -> None:
        """Raises what `S3Clients.get` raises."""
        self.name = public_name(source)
        self._place = {"Bucket": source.bucket, "Key": source.key}
        self._client = clients.get(self.name, source.region, source.endpoint)

    def open(self, start: int, validator: str | None, deadline: Deadline) -> Body:
        if start == 0 or validator is None:
            return self._body({"ChecksumMode": "ENABLED"}, deadline)
        try:
            return self._body({"Range": f"bytes={start}-", "IfMatch": validator}, deadline)
        except _Changed:
            return self._body({"ChecksumMode": "ENABLED"}, deadline)

    def open_range(self, start: int, num_bytes: int, deadline: Deadline) -> Body:
        return self._body({"Range": f"bytes={start}-{start + num_bytes - 1}"}, deadline)

    def close(self) -> None:
        """The client stays for the next object."""

    def _body(self, arguments: dict[str, str], deadline: Deadline) -> Body:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        deadline.remaining_s(self.name)
        try:
            answer = self._client.get_object(**self._place, **arguments)
        except (BotoCoreError, ClientError, HTTPClientError, ValueError) as error:
            raise _translated(self.name, error) from None
        stream = answer["Body"]
        start, total = 0, answer.get("ContentLength")
        if match := _CONTENT_RANGE.fullmatch(answer.get("ContentRange", "")):
            start, total = int(match[1]), int(match[2])
        checksum = None if match else _checksum(answer)
        return Body(
            start, total, answer.get("ETag"), _chunks(self.name, stream), stream.close, total is not None, checksum
        )


class _Changed(Interruption):
    """The object is no longer the one that was begun."""


def _check_endpoint(name: str, endpoint: str | None) -> None:
    if endpoint is None:
        return
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        sound = sound and not parts.query and (parts.port is None or parts.port > 0) and endpoint.isprintable()
    except ValueError:
        sound = False
    if not sound:
        raise InvalidParameterError(f"fetch {name}: endpoint: got something else, expected http(s)://host[:port]")


def _chunks(name: str, stream: Any) -> Iterator[bytes]:
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError, HTTPClientError
    from urllib3.exceptions import HTTPError

    while True:
        try:
            chunk = stream.read(CHUNK_BYTES)
        except FlexibleChecksumError:
            raise InvalidFormatError(f"fetch {name}: got bytes that do not have the store's checksum") from None
        except (BotoCoreError, HTTPClientError, HTTPError, OSError) as error:
            raise Interruption(f"the connection broke ({type(error).__name__})") from None
        if not chunk:
            return
        yield chunk


def _checksum(answer: dict[str, Any]) -> tuple[str, str] | None:
    """The whole object's SHA-256 where the store has one, else the MD5 that a plain upload's ETag is.  [WL-S3-2]"""
    sha256 = answer.get("ChecksumSHA256")
    if isinstance(sha256, str) and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in sha256:
        try:
            return "sha256", base64.b64decode(sha256, validate=True).hex()
        except binascii.Error:
            return None
    tag = _MD5_TAG.fullmatch(answer.get("ETag", ""))
    encrypted = answer.get("ServerSideEncryption") not in (None, "AES256") or "SSECustomerAlgorithm" in answer
    return None if tag is None or encrypted else ("md5", tag[1])


def _translated(name: str, error: Exception) -> FerrumError | Interruption:
    """The store's refusal by its code; texts of boto3 and of the store are not passed on.  [WL-SECRET-2]"""
    answer = getattr(error, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    kind = type(error).__name__
    if status == 412:
        return _Changed("the object changed")
    if code in _MISSING or status == 404:
        return NotFoundError(f"fetch {name}: got no such bucket or object, expected it to exist")
    if code in _BAD_KEYS or status == 401 or kind in ("NoCredentialsError", "PartialCredentialsError"):
        return AuthError(f"fetch {name}: got no credentials that the store takes; set them up for boto3")
    if code in _DENIED or status == 403:
        return PermissionDeniedError(f"fetch {name}: got status 403, expected credentials that may read it")
    if kind in ("ParamValidationError", "InvalidRegionError", "UnknownRegionError", "ValueError"):
        return InvalidParameterError(f"fetch {name}: got a bucket, key or region that S3 cannot have ({kind})")
    if status == 416 or (isinstance(status, int) and (status >= 500 or status == 429)):
        return Interruption(f"the store answered {status}")
    if isinstance(status, int):
        return NetworkError(f"fetch {name}: got status {status}, expected the object")
    return Interruption(f"the exchange failed ({kind})")
