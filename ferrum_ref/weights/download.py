"""A download that survives cut connections: what has arrived is kept, and only the rest is asked for again.

Clauses: WL-FETCH-1..6, WL-HASH-2, WL-LIMIT-2.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NetworkError, ResourceExhaustedError
from ferrum_ref.weights.integrity import require_sha256
from ferrum_ref.weights.progress import LoadProgress, ProgressCallback
from ferrum_ref.weights.settings import Access, Deadline, Limits
from ferrum_ref.weights.sources.remote import Body, Interruption, Remote


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What lies in the target now."""

    num_bytes: int
    sha256: str


class Download:
    """One transfer into one file."""

    def __init__(
        self, remote: Remote, limits: Limits, access: Access, deadline: Deadline, progress: ProgressCallback
    ) -> None:
        self._remote, self._limits, self._access = remote, limits, access
        self._deadline, self._progress = deadline, progress
        self._position = 0
        self._total: int | None = None
        self._validator: str | None = None
        self._checksum: tuple[str, str] | None = None
        self._sha256 = hashlib.sha256()
        self._md5: Any = None

    def run(self, target: Path, sha256: str | None, check: bool) -> Downloaded:
        """Fetch everything into `target`, which is created.  [WL-FETCH-1..6]

        Raises NetworkError, FerrumTimeoutError, NotFoundError, ResourceExhaustedError (size), FerrumIOError (disk),
        InvalidFormatError (checksum).
        """
        try:
            with target.open("xb") as file:
                self._fill(file, sha256 is not None)
                file.flush()
        except OSError as error:
            raise FerrumIOError(f"fetch {self._remote.name}: write {target.name}: {error.strerror or error}") from None
        found = self._sha256.hexdigest()
        require_sha256(self._remote.name, found, sha256)
        if check and self._checksum is not None:
            kind, promised = self._checksum
            got = found if kind == "sha256" else self._md5.hexdigest()
            if got != promised:
                raise InvalidFormatError(
                    f"fetch {self._remote.name}: {kind}: got {got}, expected {promised} as the store says"
                )
        return Downloaded(self._position, found)

    def _fill(self, file: IO[bytes], sha256_known: bool) -> None:
        failures = 0
        while True:
            before = self._position
            try:
                body = self._remote.open(self._position, self._validator, self._deadline)
                try:
                    self._begin(body, file, sha256_known)
                    self._copy(body, file)
                finally:
                    body.close()
                if self._total is None or self._position == self._total:
                    return
                raise Interruption(f"the connection ended at byte {self._position} of {self._total}")
            except Interruption as failure:
                if self._total is not None and 0 < self._position == self._total:
                    return  # all of it was here before the connection broke
                failures = 1 if self._position > before else failures + 1
                if failures > self._limits.max_resumes:
                    raise NetworkError(
                        f"fetch {self._remote.name}: {failure}; got no further in {failures} attempts, try again later"
                    ) from None
                self._access.pause(min(0.1 * 2**failures, 5.0, self._deadline.remaining_s(self._remote.name)))

    def _begin(self, body: Body, file: IO[bytes], sha256_known: bool) -> None:
        """Go on where the last body broke off, or start over when the server sends everything.  [WL-FETCH-2..3]"""
        name = self._remote.name
        if not body.is_delimited and not sha256_known:
            raise NetworkError(f"fetch {name}: got no Content-Length, so a cut cannot be told; give the sha256")
        if body.total is not None and body.total > self._limits.max_download_bytes:
            self._too_large(body.total)
        if body.start == 0 and self._position:
            file.seek(0)
            file.truncate()
            self._reset()
        elif body.start != self._position or (self._position and body.total != self._total):
            raise NetworkError(f"fetch {name}: got bytes from {body.start} on, expected them from {self._position}")
        self._total = body.total
        if body.start == 0:
            self._validator, self._checksum = body.validator, body.checksum
            if body.checksum is not None and body.checksum[0] == "md5":
                self._md5 = hashlib.md5(usedforsecurity=False)

    def _copy(self, body: Body, file: IO[bytes]) -> None:
        for chunk in body.chunks:
            self._position += len(chunk)
            if self._position > (self._limits.max_download_bytes if self._total is None else self._total):
                self._too_large(self._position)
            file.write(chunk)
            self._sha256.update(chunk)
            if self._md5 is not None:
                self._md5.update(chunk)
            self._progress(LoadProgress(self._remote.name, self._position, self._total))
            self._deadline.remaining_s(self._remote.name)

    def _reset(self) -> None:
        self._position = 0
        self._sha256 = hashlib.sha256()
        self._md5 = None

    def _too_large(self, num_bytes: int) -> None:
        raise ResourceExhaustedError(
            f"fetch {self._remote.name}: got {num_bytes} bytes, expected at most "
            f"{min(self._limits.max_download_bytes, self._total or self._limits.max_download_bytes)}; "
            "raise the loader's max_download_bytes"
        )
