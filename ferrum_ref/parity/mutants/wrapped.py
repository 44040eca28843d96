"""A part that passes everything on."""

from __future__ import annotations

from typing import Any


class Wrapped:
    """Passes every attribute on to the part inside."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
