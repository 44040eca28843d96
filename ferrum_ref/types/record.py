"""Widths of upstream's number fields, and the one check that every plain-data record makes of them.

A field annotated `U8`, `U32`, `U64` or `Usize` is an unsigned integer of that width: constructing a record with a
negative, too large or non-integer value raises InvalidParameterError. To a type checker the names below mean `int`,
`float` and `Any`; at run time they also carry their width, which the JSON codec reads (specs/json.md).

Clauses: TY-RECORD-1..2 (specs/types.md).
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

from ferrum_ref.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class IntegerWidth:
    """Integers in [low, limit)."""

    low: int
    limit: int


@dataclass(frozen=True, slots=True)
class FloatWidth:
    """Floats of that many bits."""

    bits: int


@dataclass(frozen=True, slots=True)
class MonotonicClock:
    """A reading of a monotonic clock, in seconds: it means nothing outside its process and is never serialised."""


U8: TypeAlias = Annotated[int, IntegerWidth(0, 2**8)]
U32: TypeAlias = Annotated[int, IntegerWidth(0, 2**32)]
U64: TypeAlias = Annotated[int, IntegerWidth(0, 2**64)]
Usize: TypeAlias = Annotated[int, IntegerWidth(0, 2**64)]
F32: TypeAlias = Annotated[float, FloatWidth(32)]
F64: TypeAlias = Annotated[float, FloatWidth(64)]
Instant: TypeAlias = Annotated[float, MonotonicClock()]
Json: TypeAlias = Any

UNSIGNED_LIMITS = {"U8": 2**8, "U32": 2**32, "U64": 2**64, "Usize": 2**64}


class Record:
    """Base of the data classes in this package: checks the unsigned fields.  [TY-RECORD-1..2]"""

    __slots__ = ()
    _unsigned: ClassVar[tuple[tuple[str, int], ...]] = ()

    def __init_subclass__(cls) -> None:
        found = []
        for name, annotation in inspect.get_annotations(cls).items():
            width = str(annotation).split("|")[0].strip()
            if width in UNSIGNED_LIMITS:
                found.append((name, UNSIGNED_LIMITS[width]))
        cls._unsigned = tuple(found)

    def __post_init__(self) -> None:
        for name, limit in self._unsigned:
            value = getattr(self, name)
            if value is not None:
                check_unsigned(value, limit, type(self).__name__, name)


def check_unsigned(value: object, limit: int, owner: str, name: str) -> int:
    """`value` as an int in [0, limit).  Pure.  Raises InvalidParameterError otherwise.  [TY-RECORD-1]"""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidParameterError(f"{owner}: {name} must be an integer, got {value!r}") from None
    if not 0 <= number < limit:
        raise InvalidParameterError(f"{owner}: {name} must be in [0, {limit}), got {number}")
    return number
