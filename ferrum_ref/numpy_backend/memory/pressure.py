"""Delivers changes to listeners: every change once, in order, outside all locks.

Clauses: ME-PRESSURE-4..7 (specs/memory.md).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

LOG = logging.getLogger(__name__)

Change = TypeVar("Change")


class Notifier(Generic[Change]):
    """A queue of changes and the listeners that hear of them.

    `push` under the lock of the state that changed, so that the order is that of the changes; `drain` after releasing
    it. One thread delivers at a time: a drain inside a listener, or in another thread meanwhile, returns at once and
    leaves its changes to the one that delivers.  [ME-PRESSURE-6]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Change] = deque()
        self._is_delivering = False
        self._callback: Callable[[Change], None] | None = None
        self._listeners: list[Callable[[Change], None]] = []

    def set_callback(self, callback: Callable[[Change], None]) -> None:
        """Replace the one callback; listeners are apart from it."""
        with self._lock:
            self._callback = callback

    def add(self, listener: Callable[[Change], None]) -> None:
        """Add a listener, unless it is there."""
        with self._lock:
            if listener not in self._listeners:
                self._listeners.append(listener)

    def remove(self, listener: Callable[[Change], None]) -> None:
        """Remove a listener, if it is there."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def push(self, change: Change) -> None:
        """Queue a change."""
        with self._lock:
            self._pending.append(change)

    def drain(self) -> None:
        """Deliver what is queued. A listener's exception is logged and stops nothing.  [ME-PRESSURE-7]"""
        if not self._begin():
            return
        try:
            while (change := self._next()) is not None:
                for listener in change[1]:
                    _call(listener, change[0])
        except BaseException:
            with self._lock:
                self._is_delivering = False
            raise

    def _begin(self) -> bool:
        with self._lock:
            if self._is_delivering or not self._pending:
                return False
            self._is_delivering = True
            return True

    def _next(self) -> tuple[Change, list[Callable[[Change], None]]] | None:
        with self._lock:
            if not self._pending:
                self._is_delivering = False
                return None
            callbacks = [] if self._callback is None else [self._callback]
            return self._pending.popleft(), [*callbacks, *self._listeners]


def _call(listener: Callable[[Change], None], change: Change) -> None:
    try:
        listener(change)
    except Exception:
        LOG.exception("memory pressure: a callback raised on %r; the memory operation itself is complete", change)
