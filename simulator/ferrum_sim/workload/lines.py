"""Lines of a trace file, numbered as an editor numbers them, and errors that name file and line.  [SI-TRACE-3]"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ferrum_ref.errors import FerrumIOError, InvalidFormatError

LARGEST_COUNT = 2**31


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without line end) of each line that is not blank; a byte-order mark is skipped.

    Raises FerrumIOError when the file cannot be read, InvalidFormatError where it is not UTF-8 text.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip("\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise InvalidFormatError(
            f"read trace: {path}, after line {number}: byte {error.start} of the block is not UTF-8 text; "
            "expected a CSV or JSON-lines trace"
        ) from error
    except OSError as error:
        raise FerrumIOError(f"read trace: {path}: {error.strerror}; expected a readable trace file") from error


def bad_line(path: Path, line_number: int, got: str, expected: str) -> InvalidFormatError:
    """The error for one malformed line. Pure."""
    return InvalidFormatError(f"read trace: {path}, line {line_number}: got {got}; expected {expected}")


def whole_number(path: Path, line_number: int, name: str, value: object, least: int) -> int:
    """`value` (text or a JSON number) as an int in least..2^31. Raises InvalidFormatError naming the line. Pure."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 12:
        number: int | None = int(text)
    else:
        number = text if isinstance(text, int) and not isinstance(text, bool) else None
    if number is None or not least <= number <= LARGEST_COUNT:
        raise bad_line(path, line_number, f"{name} {_shortened(value)}", f"a whole number from {least} to 2^31")
    return number


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
