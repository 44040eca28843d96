"""Checks of single configuration values, shared by the families.  Clause: FM-BERT-1 (specs/families.md)."""

from __future__ import annotations

import math
from typing import Final

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config import quoted

MAX_SIZE: Final = 2**31 - 1


def size(value: object, field: str) -> int:
    """`value` as a count from 1 to 2**31 - 1.  Pure.  Raises ConfigError, naming the field."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{field}: got {quoted(value)}, expected an integer from 1 to {MAX_SIZE}")
    return value


def positive_number(value: object, field: str) -> float:
    """`value` as a finite number above 0.  Pure.  Raises ConfigError, naming the field."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf and value < 2**1000:
        return float(value)
    raise ConfigError(f"{field}: got {quoted(value)}, expected a positive finite number")


def finite_number(value: object, field: str) -> float:
    """`value` as a finite number of either sign.  Pure.  Raises ConfigError, naming the field."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    raise ConfigError(f"{field}: got {quoted(value)}, expected a finite number")


def flag(value: object, field: str) -> bool:
    """`value` as true or false.  Pure.  Raises ConfigError, naming the field."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field}: got {quoted(value)}, expected true or false")
    return value
