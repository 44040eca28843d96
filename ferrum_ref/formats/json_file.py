"""JSON files of a model directory, read without trusting them.  Clause: MD-JSON-1 (specs/model_files.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError

_MAX_BYTES: Final = 64 * 2**20


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  [MD-JSON-1]

    Raises NotFoundError (no such file), FerrumIOError (unreadable), InvalidFormatError (too large, not UTF-8, not
    JSON, a name given twice, not an object); each names the file, and where it can the line and column.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidFormatError(f"read {path}: got {path.stat().st_size} bytes, expected at most {_MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"read {path}: no such file") from None
    except OSError as error:
        raise FerrumIOError(f"read {path}: {error.strerror or error}") from error
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """The object in JSON text; `source` stands in the message.  Raises InvalidFormatError.  [MD-JSON-1]"""
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise InvalidFormatError(f"read {source}: byte {error.start}: got {error.reason}, expected UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidFormatError(
            f"read {source}: line {error.lineno} column {error.colno}: {error.msg}, expected JSON"
        ) from None
    except (ValueError, RecursionError) as error:  # a name twice, a number of thousands of digits, endless nesting
        raise InvalidFormatError(f"read {source}: {error}, expected plain JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidFormatError(f"read {source}: got a {type(parsed).__name__}, expected a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"got the name {twice!a:.100} twice")
    return found
