"""What a loader may use and how much of it: limits, the ways into the network, clocks.  Clauses: WL-LIMIT-1..2."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ferrum_ref.errors import ConfigError, FerrumTimeoutError
from ferrum_ref.interfaces.weights import WeightLoaderConfig

_LONGEST_WAIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond these, ResourceExhaustedError.  [WL-LIMIT-1]"""

    max_tensor_bytes: int = 64 * 2**30
    max_download_bytes: int = 2**40
    max_resumes: int = 8  # failures in a row without a byte of progress


@dataclass(frozen=True, slots=True)
class Access:
    """Ways into the network, for whoever wires the loader; nothing is read from the environment here.

    `proxies`: scheme -> address, as `urllib.request.getproxies()` returns it. `s3_session`: a boto3.Session, None for
    boto3's own search for credentials. `hub_token`: None for huggingface_hub's own search.
    """

    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)
    s3_session: Any = field(default=None, repr=False)
    hub_endpoint: str | None = field(default=None, repr=False)
    hub_token: str | None = field(default=None, repr=False)
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


class Deadline:
    """The moment until which a fetch must be finished."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end_s = clock() + timeout_s

    def remaining_s(self, what: str) -> float:
        """Seconds left, at most those that one network operation may wait.  Raises FerrumTimeoutError when over."""
        left = self._end_s - self._clock()
        if left <= 0:
            raise FerrumTimeoutError(
                f"fetch {what}: got no end within {self.timeout_s:g} s; raise download_timeout_seconds"
            )
        return min(left, _LONGEST_WAIT_S)


def check_config(config: WeightLoaderConfig) -> None:
    """Raises ConfigError for settings that cannot work.  [WL-DATA-4]"""
    for name in ("max_concurrent_downloads", "download_timeout_seconds"):
        if getattr(config, name) < 1:
            raise ConfigError(f"WeightLoaderConfig: {name}: got 0, expected at least 1")
    if config.cache_dir == "":
        raise ConfigError("WeightLoaderConfig: cache_dir: got '', expected a directory or None")
