"""HTTP and HTTPS, over the standard library: ranges, resumption, redirects that carry no credential elsewhere.

Clauses: WL-FETCH-1..6, WL-SECRET-2..3.  Source: RFC 9110, sections 13.1.5 (If-Range), 14 (ranges), 15.4 (redirects).
"""

from __future__ import annotations

import base64
import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

from ferrum_ref.errors import (
    AuthError,
    FerrumError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.weights_address import public_address
from ferrum_ref.weights.settings import Deadline
from ferrum_ref.weights.sources.remote import CHUNK_BYTES, Body, Interruption, Remote

_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_TRY_AGAIN: Final = (408, 425, 429, 500, 502, 503, 504)
_MAX_REDIRECTS: Final = 5
_PORTS: Final[dict[str, int]] = {"http": 80, "https": 443}


class UrlRemote(Remote):
    """One http(s) address.  The headers go to that origin only."""

    def __init__(self, url: str, headers: Mapping[str, str], proxies: Mapping[str, str]) -> None:
        """Raises InvalidParameterError for what is no address or header, UnsupportedError for another scheme."""
        self.name = public_address(url)
        parts = split_address(url)
        self._origin = _origin(parts)
        self._url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path or "/", parts.query, ""))
        self._headers = _checked(self.name, {**_basic(parts), **headers})
        self._opener = urllib.request.OpenerDirector()
        self._opener.addheaders = [("User-Agent", "ferrum-ref")]
        for handler in (
            urllib.request.ProxyHandler(dict(proxies)),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        ):
            self._opener.add_handler(handler)

    def open(self, start: int, validator: str | None, deadline: Deadline) -> Body:
        resumes = start > 0 and validator is not None
        ranges = {"Range": f"bytes={start}-", "If-Range": validator} if resumes else {}
        return self._body({key: value for key, value in ranges.items() if value is not None}, deadline)

    def open_range(self, start: int, num_bytes: int, deadline: Deadline) -> Body:
        return self._body({"Range": f"bytes={start}-{start + num_bytes - 1}"}, deadline)

    def close(self) -> None:
        self._opener.close()

    def _body(self, headers: Mapping[str, str], deadline: Deadline) -> Body:
        answer = self._request(headers, deadline)
        try:
            return self._described(answer)
        except BaseException:
            answer.close()
            raise

    def _described(self, answer: Any) -> Body:
        start, total = 0, _number(answer.headers.get("Content-Length"))
        if answer.status == 206:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
            if match is None:
                raise NetworkError(f"fetch {self.name}: got status 206 without a sound Content-Range, expected one")
            start, total = int(match[1]), int(match[3])
        if answer.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise NetworkError(f"fetch {self.name}: got an encoded body, expected the plain one that was asked for")
        is_delimited = total is not None or answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
        return Body(start, total, _validator(answer.headers), _chunks(answer), answer.close, is_delimited)

    def _request(self, headers: Mapping[str, str], deadline: Deadline) -> Any:
        """The answer to a GET, after redirects.  [WL-SECRET-3]"""
        url, credentials = self._url, self._headers
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self._send(url, {**credentials, "Accept-Encoding": "identity", **headers}, deadline)
            if answer.status not in (301, 302, 303, 307, 308):
                if answer.status not in (200, 206):
                    answer.close()
                    _refuse(self.name, answer.status)
                return answer
            answer.close()
            url = self._redirected(url, answer.headers.get("Location", ""))
            if _origin(urlsplit(url)) != self._origin:
                credentials = {}
        raise NetworkError(f"fetch {self.name}: got more than {_MAX_REDIRECTS} redirects, expected an answer")

    def _redirected(self, url: str, location: str) -> str:
        try:
            parts = split_address(urljoin(url, location))
        except (FerrumError, ValueError):
            raise NetworkError(f"fetch {self.name}: got a redirect to no web address, expected http or https") from None
        if urlsplit(url).scheme == "https" and parts.scheme == "http":
            raise NetworkError(f"fetch {self.name}: got a redirect from https to http, expected https")
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path or "/", parts.query, ""))

    def _send(self, url: str, headers: Mapping[str, str], deadline: Deadline) -> Any:
        try:
            request = urllib.request.Request(url, headers=dict(headers))
            return self._opener.open(request, timeout=deadline.remaining_s(self.name))
        except FerrumError:
            raise
        except urllib.error.URLError as error:
            raise _failure(self.name, error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise _failure(self.name, error) from None
        except (ValueError, AssertionError):
            raise InvalidParameterError(f"fetch {self.name}: got an address or header that HTTP cannot carry") from None


def split_address(url: str) -> SplitResult:
    """The parts of an http(s) URL.  Raises InvalidParameterError, UnsupportedError; the text never shows the URL."""
    shown = public_address(url)
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except (ValueError, AttributeError, TypeError):
        sound = False
    if not sound or not url.isprintable() or not url.isascii() or " " in url:
        raise InvalidParameterError(
            f"fetch {shown}: url: got something else, expected an http(s) address, percent-encoded"
        )
    if parts.scheme not in _PORTS:
        raise UnsupportedError(f"fetch {shown}: scheme: got another one, expected http or https")
    return parts


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _basic(parts: SplitResult) -> dict[str, str]:
    if parts.username is None and parts.password is None:
        return {}
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _checked(name: str, headers: Mapping[str, str]) -> dict[str, str]:
    for key, value in headers.items():
        sound = isinstance(key, str) and isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", key)
        if not sound or not value.isprintable() or not value.isascii():
            raise InvalidParameterError(f"fetch {name}: headers: got a name or value that HTTP cannot carry")
    return dict(headers)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) <= 19 else None


def _validator(headers: Any) -> str | None:
    """A strong ETag, else the date of change; a weak ETag may name two contents.  [WL-FETCH-2]"""
    etag = headers.get("ETag", "").strip()
    if etag:
        return None if etag.startswith("W/") else str(etag)
    changed = headers.get("Last-Modified")
    return None if changed is None else str(changed)


def _chunks(answer: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = answer.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Interruption(f"the connection broke ({type(error).__name__})") from None
        if not chunk:
            return
        yield chunk


def _refuse(name: str, status: int) -> None:
    """Always raises.  [WL-FETCH-5]"""
    if status in (404, 410):
        raise NotFoundError(f"fetch {name}: got status {status}, expected the file to exist")
    if status in (401, 407):
        raise AuthError(f"fetch {name}: got status {status}, expected credentials; give them as request headers")
    if status == 403:
        raise PermissionDeniedError(f"fetch {name}: got status 403, expected credentials that may read it")
    if status in _TRY_AGAIN or status == 416:
        raise Interruption(f"the server answered {status}")
    raise NetworkError(f"fetch {name}: got status {status}, expected 200 or 206")


def _failure(name: str, reason: object) -> FerrumError | Interruption:
    """What a failed exchange means; its own text may quote the address and is not passed on."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        return NetworkError(f"fetch {name}: got a TLS certificate that does not verify, expected a trusted one")
    if isinstance(reason, http.client.InvalidURL | http.client.UnknownProtocol):
        return NetworkError(f"fetch {name}: got an answer that is not HTTP")
    if isinstance(reason, OSError) and reason.strerror:
        return Interruption(f"the exchange failed ({reason.strerror})")
    return Interruption(f"the exchange failed ({type(reason).__name__})")
