"""Between JSON text and plain values: what upstream's parser refuses is refused here, with the place.

Python's own parser is laxer than serde_json: it takes NaN, repeated keys, numbers of any size and lone surrogates. The
parse marks what must not pass; one walk over the result names the first mark by its path.
Clauses: TY-JSON-3, TY-JSON-15..17 (specs/json.md).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from ferrum_ref.errors import SerializationError
from ferrum_ref.serialization.form import member, shorten

# serde_json's limit: the 128th list or object inside one another is refused.
MAX_DEPTH = 127
LOWEST_INTEGER = -(2**63)
INTEGER_LIMIT = 2**64


class _Refused:
    """Stands in a parsed tree where the text had something that must not pass."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


def parse(text: str) -> Any:
    """The plain value that `text` says.  Pure.  Raises SerializationError with the path.  [TY-JSON-15..17]"""
    if not isinstance(text, str):
        raise SerializationError(f"got a {type(text).__name__}, expected JSON text", path="")
    try:
        tree = json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=lambda name: _Refused(f"{name} is no JSON number"),
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        raise SerializationError(
            f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}", path=""
        ) from None
    except RecursionError:
        raise SerializationError(f"lists and objects nest deeper than {MAX_DEPTH} levels", path="") from None
    check(tree)
    return tree


def render(tree: Any, pretty: bool) -> str:
    """The text of a plain value, in upstream's compact layout or its two-space one.  [TY-JSON-3]"""
    check(tree)
    if pretty:
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=2)
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check(tree: Any) -> None:
    """Nothing that JSON cannot hold, and no deeper nesting than upstream reads.  [TY-JSON-15..17]"""
    pending: list[tuple[Any, str, int]] = [(tree, "", 1)]
    while pending:
        value, path, depth = pending.pop()
        if isinstance(value, _Refused):
            raise SerializationError(value.reason, path=path)
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise SerializationError(f"lists and objects nest deeper than {MAX_DEPTH} levels", path="")
            if isinstance(value, dict):
                for key in value:
                    _check_text(key, path)
                inside = [(item, path + member(key), depth + 1) for key, item in value.items()]
            else:
                inside = [(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
            pending.extend(reversed(inside))


def _check_text(text: str, path: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise SerializationError("a text holds half of a surrogate pair", path=path) from None


def _integer(digits: str) -> Any:
    """As serde_json: 64-bit integers are exact, larger ones and -0 are floats."""
    if len(digits) <= 20 and digits != "-0" and LOWEST_INTEGER <= (number := int(digits)) < INTEGER_LIMIT:
        return number
    return _float(digits)


def _float(digits: str) -> Any:
    number = float(digits)
    return number if math.isfinite(number) else _Refused("a number lies beyond the range of float64")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _Refused(f"the key {shorten(key)} stands there twice")
        seen.add(key)
    return found


def fail(operation: str, kind: Any, root: str, error: SerializationError) -> NoReturn:
    """Raise `error` as the caller sees it: operation, type, path from the root, reason."""
    path = root + (error.path or "")
    name = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    raise SerializationError(f"{operation}({name}): {path}: {error.message}", path=path) from None
