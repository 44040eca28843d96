"""Delivers changes of the pressure level: each once, in order, outside the manager's lock.

Clauses: BK-CUPY-23 (specs/backend_cupy.md), ME-PRESSURE-4..7 (specs/memory.md).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from ferrum_ref.interfaces.memory import MemoryPressure

LOG = logging.getLogger(__name__)
Listener: TypeAlias = Callable[[MemoryPressure], None]


class PressureNotifier:
    """`push` under the lock of what changed, `deliver` after it is released.

    One thread delivers at a time; what others push meanwhile, or a listener itself, is left to it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._levels: deque[MemoryPressure] = deque()
        self._is_delivering = False
        self._callback: Listener | None = None
        self._listeners: list[Listener] = []

    def set_callback(self, callback: Listener) -> None:
        """Replace the one callback; listeners are apart from it."""
        with self._lock:
            self._callback = callback

    def add(self, listener: Listener) -> None:
        """Add a listener, unless it is there."""
        with self._lock:
            if listener not in self._listeners:
                self._listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        """Remove a listener, if it is there."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def push(self, level: MemoryPressure) -> None:
        """Queue a change."""
        with self._lock:
            self._levels.append(level)

    def deliver(self) -> None:
        """Call whoever listens. Their exceptions are logged and stop nothing; an interrupt ends the delivery."""
        with self._lock:
            if self._is_delivering:
                return
            self._is_delivering = True
        try:
            while True:
                with self._lock:
                    if not self._levels:
                        self._is_delivering = False
                        return
                    level = self._levels.popleft()
                    listeners = [*([self._callback] if self._callback else []), *self._listeners]
                for listener in listeners:
                    _call(listener, level)
        except BaseException:
            with self._lock:
                self._is_delivering = False
            raise


def _call(listener: Listener, level: MemoryPressure) -> None:
    try:
        listener(level)
    except Exception:
        LOG.exception("memory pressure: a callback raised on %r; the memory operation itself is complete", level)
