"""One operation of an executor at a time, whatever thread it comes from.

Clauses: MX-THREAD-1 (specs/model_executor.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Guarded(Protocol):
    """An object with a lock of its own, which its thread may take again."""

    guard: threading.RLock


Owner = TypeVar("Owner", bound=Guarded)


def exclusive(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """The method, run under its object's lock.  [MX-THREAD-1]"""

    @wraps(method)
    def guarded(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.guard:
            return method(self, *args, **kwargs)

    return guarded
