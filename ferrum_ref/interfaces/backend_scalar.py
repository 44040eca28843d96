"""A scalar launch argument of stated width; see `backend`.  Clauses: BK-ARG-1..2 in specs/backend.md."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from ferrum_ref.errors import InvalidParameterError

SCALAR_TYPES: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {
        "I8": np.dtype(np.int8),
        "I16": np.dtype(np.int16),
        "I32": np.dtype(np.int32),
        "I64": np.dtype(np.int64),
        "U8": np.dtype(np.uint8),
        "U16": np.dtype(np.uint16),
        "U32": np.dtype(np.uint32),
        "U64": np.dtype(np.uint64),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "Bool": np.dtype(np.bool_),
    }
)


@dataclass(frozen=True, slots=True)
class ScalarValue:
    """A typed scalar: `ScalarValue.I8(v)` ... `.I64`, `.U8` ... `.U64`, `.F32`, `.F64`, `.Bool`.  [BK-ARG-1..2]

    The value is brought to its width on construction: integers modulo 2**bits (two's complement), F32 to the nearest
    float32, ties to even, infinity beyond its range. Raises InvalidParameterError for a value of another kind.
    """

    kind: str
    value: int | float | bool

    def __post_init__(self) -> None:
        if self.kind not in SCALAR_TYPES:
            raise InvalidParameterError(f"ScalarValue: kind: got {self.kind!r}, expected {', '.join(SCALAR_TYPES)}")
        object.__setattr__(self, "value", _narrowed(self.kind, self.value).item())

    def to_numpy(self) -> np.generic:
        """The value as a numpy scalar of its own width. Pure."""
        return _narrowed(self.kind, self.value)

    @staticmethod
    def I8(value: int) -> ScalarValue:
        return ScalarValue("I8", value)

    @staticmethod
    def I16(value: int) -> ScalarValue:
        return ScalarValue("I16", value)

    @staticmethod
    def I32(value: int) -> ScalarValue:
        return ScalarValue("I32", value)

    @staticmethod
    def I64(value: int) -> ScalarValue:
        return ScalarValue("I64", value)

    @staticmethod
    def U8(value: int) -> ScalarValue:
        return ScalarValue("U8", value)

    @staticmethod
    def U16(value: int) -> ScalarValue:
        return ScalarValue("U16", value)

    @staticmethod
    def U32(value: int) -> ScalarValue:
        return ScalarValue("U32", value)

    @staticmethod
    def U64(value: int) -> ScalarValue:
        return ScalarValue("U64", value)

    @staticmethod
    def F32(value: float) -> ScalarValue:
        return ScalarValue("F32", value)

    @staticmethod
    def F64(value: float) -> ScalarValue:
        return ScalarValue("F64", value)

    @staticmethod
    def Bool(value: bool) -> ScalarValue:
        return ScalarValue("Bool", value)


def _narrowed(kind: str, value: Any) -> np.generic:
    element = SCALAR_TYPES[kind]
    if element.kind == "b":
        if not isinstance(value, (bool, np.bool_)):
            raise _refused(kind, value, "a bool")
        return np.bool_(value)
    if element.kind == "f":
        if not isinstance(value, (int, float, np.integer, np.floating)):
            raise _refused(kind, value, "a number")
        with np.errstate(over="ignore"):
            return element.type(_as_float(value))  # type: ignore[no-any-return]
    try:
        bits = operator.index(value) & ((1 << 8 * element.itemsize) - 1)
    except TypeError:
        raise _refused(kind, value, "an integer") from None
    return np.dtype(f"u{element.itemsize}").type(bits).view(element)  # type: ignore[no-any-return]


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return float("inf") if value > 0 else float("-inf")


def _refused(kind: str, value: object, expected: str) -> InvalidParameterError:
    return InvalidParameterError(f"ScalarValue.{kind}: got {value!r}, expected {expected}")
