"""The types of a record's fields, at run time and with their widths."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import ferrum_ref.types
from ferrum_ref.errors import SerializationError
from ferrum_ref.types import record


def hints_of(owner: Any) -> dict[str, Any]:
    """Annotations of a class or function with `Annotated` kept.

    A name that its own module imports for type checkers only is looked up in `ferrum_ref.types`. Pure.
    Raises SerializationError when a name is found nowhere.
    """
    found: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(owner, localns=found, include_extras=True)
        except NameError as error:
            name = error.name
        for place in (ferrum_ref.types, record):
            if name is not None and name not in found and hasattr(place, name):
                found[name] = getattr(place, name)
                break
        else:
            raise SerializationError(
                f"{owner.__qualname__} is annotated with {name!r}, which cannot be resolved at run time", path=""
            )


def is_data(kind: Any) -> bool:
    """A class with the fields of a dataclass, its own or inherited ones."""
    return inspect.isclass(kind) and dataclasses.is_dataclass(kind)
