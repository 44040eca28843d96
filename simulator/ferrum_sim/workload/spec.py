"""Distribution specifications as text: `name:number,number,...`."""

from __future__ import annotations

import math

from ferrum_ref.errors import InvalidParameterError


def parse_spec(text: str, forms: dict[str, tuple[int, int]], operation: str) -> tuple[str, list[float]]:
    """Name and numbers of `name:number,...`; `forms` gives each known name's least and greatest count of numbers. Pure.

    Raises InvalidParameterError for an unknown name, a number that is none, or a wrong count.  [SI-WORKLOAD-4]
    """
    name, _, rest = text.partition(":")
    if name not in forms:
        raise InvalidParameterError(
            f"{operation}: '{text}' names no known distribution; expected one of {', '.join(sorted(forms))}"
        )
    least, greatest = forms[name]
    parts = rest.split(",") if rest else []
    if not least <= len(parts) <= greatest:
        expected = str(least) if least == greatest else f"{least} to {greatest}"
        raise InvalidParameterError(
            f"{operation}: '{text}' has {len(parts)} numbers; '{name}' takes {expected}, e.g. {name}:"
            + ",".join(["4"] * least)
        )
    return name, [_number(part, text, operation) for part in parts]


def _number(part: str, text: str, operation: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidParameterError(f"{operation}: '{part}' in '{text}' is not a number; expected a finite number")
    return value


def require(condition: bool, operation: str, text: str, expected: str) -> None:
    """Raise InvalidParameterError "operation: 'text' …; expected …" unless `condition`. Pure."""
    if not condition:
        raise InvalidParameterError(f"{operation}: '{text}' is outside its domain; expected {expected}")
