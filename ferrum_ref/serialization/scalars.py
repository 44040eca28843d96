"""Forms of numbers, texts, times, bytes and plain JSON values.  Clauses: TY-JSON-2..7 (specs/json.md)."""

from __future__ import annotations

import math
import operator
import re
import uuid
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Annotated, Any, get_args, get_origin

import numpy as np

from ferrum_ref.errors import SerializationError
from ferrum_ref.serialization.form import Form, Forms, member, misfit, within
from ferrum_ref.serialization.text import INTEGER_LIMIT, LOWEST_INTEGER, MAX_DEPTH
from ferrum_ref.types.record import FloatWidth, IntegerWidth

UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
RFC_3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)


def register(forms: Forms) -> None:
    """Make the forms of this file known."""
    forms.register(
        _is_plain,
        lambda *_: Form(partial(plain, reading=True), plain),
    )
    forms.register(lambda kind: kind is bool, lambda *_: Form(_truth, _truth))
    forms.register(lambda kind: kind is int, lambda *_: integer(LOWEST_INTEGER, 2**63))
    forms.register(lambda kind: kind is float, lambda *_: floating(64))
    forms.register(lambda kind: kind is str, lambda *_: Form(_text, _text))
    forms.register(lambda kind: kind is bytes, lambda *_: Form(_read_bytes, _write_bytes))
    forms.register(lambda kind: kind is uuid.UUID, lambda *_: Form(_read_uuid, _write_uuid))
    forms.register(lambda kind: kind is datetime, lambda *_: Form(_read_time, _write_time))
    forms.register(lambda kind: kind is timedelta, lambda *_: Form(_read_span, _write_span))
    forms.register(_is_annotated, _annotated)


def _is_annotated(kind: Any) -> bool:
    return get_origin(kind) is Annotated


def _is_plain(kind: object) -> bool:
    return kind in (Any, object, type(None))


def _annotated(kind: Any, forms: Forms) -> Form:
    bare, *notes = get_args(kind)
    for note in notes:
        if isinstance(note, IntegerWidth):
            return integer(note.low, note.limit)
        if isinstance(note, FloatWidth):
            return floating(note.bits)
    return forms.of(bare)


def integer(low: int, limit: int) -> Form:
    """Integers in [low, limit); a float is none, not even 1.0, and neither is a bool.  [TY-JSON-2]"""

    def in_range(number: int) -> int:
        if not low <= number < limit:
            raise SerializationError(f"got {number}, expected an integer in [{low}, {limit})", path="")
        return number

    def read(value: Any) -> int:
        if type(value) is not int:
            raise misfit(value, "an integer")
        return in_range(value)

    def write(value: Any) -> int:
        if isinstance(value, (bool, np.bool_)):
            raise misfit(value, "an integer")
        try:
            return in_range(operator.index(value))
        except TypeError:
            raise misfit(value, "an integer") from None

    return Form(read, write)


def floating(bits: int) -> Form:
    """Floats: of 32 bits as the shortest text that names the float32; NaN and infinities are null.  [TY-JSON-3]"""
    narrow = _nearest_float32 if bits == 32 else float

    def read(value: Any) -> float:
        if type(value) not in (int, float):
            raise misfit(value, "a number")
        try:
            number = narrow(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise SerializationError(f"a number lies beyond the range of float{bits}", path="")
        return number

    def write(value: Any) -> float | None:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise misfit(value, "a number")
        if not math.isfinite(value):
            return None
        return read(float(value))

    return Form(read, write)


def _nearest_float32(number: float) -> float:
    """The float whose shortest text is the shortest text of the float32 nearest to `number`."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(number)))


def plain(value: Any, *, reading: bool = False, depth: int = 1) -> Any:
    """A copy of a plain JSON value. Written NaN and infinities are null; they cannot be read.  [TY-JSON-7]

    Raises SerializationError for what JSON cannot hold: other types, keys that are no text, integers beyond 64 bits.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return integer(LOWEST_INTEGER, INTEGER_LIMIT).write(value)
    if isinstance(value, float):
        return floating(64).read(value) if reading else floating(64).write(value)
    if depth > MAX_DEPTH:
        raise SerializationError(f"lists and objects nest deeper than {MAX_DEPTH} levels", path="")
    if isinstance(value, (list, tuple)):
        return [_inside(f"[{index}]", item, reading, depth) for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise misfit(key, "a text as key")
        return {key: _inside(member(key), item, reading, depth) for key, item in value.items()}
    raise misfit(value, "a plain JSON value")


def _inside(step: str, value: Any, reading: bool, depth: int) -> Any:
    try:
        return plain(value, reading=reading, depth=depth + 1)
    except SerializationError as error:
        raise within(step, error) from None


def _truth(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise misfit(value, "true or false")
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise misfit(value, "a text")
    return str(value)


def _read_bytes(value: Any) -> bytes:
    octet = integer(0, 256)
    if not isinstance(value, list):
        raise misfit(value, "a list of bytes")
    for index, item in enumerate(value):
        try:
            octet.read(item)
        except SerializationError as error:
            raise within(f"[{index}]", error) from None
    return bytes(value)


def _write_bytes(value: Any) -> list[int]:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise misfit(value, "bytes")
    return list(bytes(value))


def _read_uuid(value: Any) -> uuid.UUID:
    if not isinstance(value, str):
        raise misfit(value, "a UUID as text")
    if not UUID_TEXT.fullmatch(value):
        raise SerializationError("a text is no hyphenated UUID", path="")
    return uuid.UUID(value)


def _write_uuid(value: Any) -> str:
    if not isinstance(value, uuid.UUID):
        raise misfit(value, "a UUID")
    return str(value)


def _read_time(value: Any) -> datetime:
    """RFC 3339 in any offset, as UTC; digits below a microsecond are dropped.  [TY-JSON-5]"""
    if not isinstance(value, str):
        raise misfit(value, "an RFC 3339 time as text")
    parts = RFC_3339.fullmatch(value)
    if parts is None:
        raise SerializationError("a text is no RFC 3339 time", path="")
    *numbers, fraction, sign, hours, minutes = parts.groups()
    try:
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        if int(hours or 0) > 23 or int(minutes or 0) > 59:
            raise ValueError
        year, month, day, hour, minute, second = map(int, numbers)
        micros = int(((fraction or "") + "000000")[:6])
        zone = timezone(-offset if sign == "-" else offset)
        return datetime(year, month, day, hour, minute, second, micros, zone).astimezone(UTC)
    except (ValueError, OverflowError):
        raise SerializationError("a text is an RFC 3339 time of no calendar day or clock", path="") from None


def _write_time(value: Any) -> str:
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise misfit(value, "a time with its zone")
    try:
        moment = value.astimezone(UTC)
    except OverflowError:
        raise SerializationError("a time lies beyond the year 9999 or before the year 1 in UTC", path="") from None
    digits = "seconds" if moment.microsecond == 0 else "microseconds" if moment.microsecond % 1000 else "milliseconds"
    return moment.replace(tzinfo=None).isoformat(timespec=digits) + "Z"


def _read_span(value: Any) -> timedelta:
    """{"secs": u64, "nanos": u32}; digits below a microsecond are dropped.  [TY-JSON-6]"""
    if not isinstance(value, dict) or set(value) != {"secs", "nanos"}:
        raise misfit(value, 'an object with the keys "secs" and "nanos"')
    numbers = []
    for key, limit in (("secs", 2**64), ("nanos", 2**32)):
        try:
            numbers.append(integer(0, limit).read(value[key]))
        except SerializationError as error:
            raise within(f".{key}", error) from None
    try:
        return timedelta(seconds=numbers[0], microseconds=numbers[1] // 1000)
    except OverflowError:
        raise SerializationError("a duration is longer than 999999999 days", path=".secs") from None


def _write_span(value: Any) -> dict[str, int]:
    if not isinstance(value, timedelta) or value < timedelta(0):
        raise misfit(value, "a duration >= 0")
    return {"secs": value.days * 86400 + value.seconds, "nanos": value.microseconds * 1000}
