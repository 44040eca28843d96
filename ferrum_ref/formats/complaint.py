"""One shape for every complaint about a file: who read what, got and expected, on one short line."""

from __future__ import annotations

from typing import Final

from ferrum_ref.errors import InvalidFormatError, UnsupportedError

_MAX_QUOTED_CHARACTERS: Final = 100


def quoted(value: object) -> str:
    """A file's text as it may stand in a message: short, printable, on one line."""
    text = value if isinstance(value, str) else repr(value)
    short = text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "..."
    return short if short.isprintable() else ascii(short)


def invalid(reader: str, source: str, field: str, got: object, expected: str) -> InvalidFormatError:
    """The error for a file that is not what it claims to be."""
    return InvalidFormatError(
        f"read {reader} {source}: {quoted(field)}: got {quoted(got)}, expected {expected:.160}; get the file again"
    )


def unsupported(reader: str, source: str, field: str, got: object, expected: str) -> UnsupportedError:
    """The error for a sound file with content that is not offered."""
    return UnsupportedError(f"read {reader} {source}: {quoted(field)}: got {quoted(got)}, expected {expected:.200}")
