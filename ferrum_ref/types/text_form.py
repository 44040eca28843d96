"""Types whose text form is a part of the contract.

Upstream: `fmt::Display`.  The text itself is stated with each type (specs/types.md).
"""

from __future__ import annotations

from collections.abc import Callable


class Displayed:
    """A type with a text form of its own: `str(x)` is what upstream prints for `{x}`.  Declares, holds nothing."""

    __slots__ = ()

    __str__: Callable[[], str]
