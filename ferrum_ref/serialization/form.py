"""How one type is read from and written to plain JSON values, and where the forms of other types are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cattrs import Converter

from ferrum_ref.errors import SerializationError

Predicate = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Form:
    """`read` turns a plain JSON value into a typed one, `write` the other way; both raise SerializationError."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A type as cattrs is asked for it. Bare, `str`, `int` and their subclasses would get cattrs' own lenient forms."""

    kind: Any


class Forms:
    """Looks forms up by type; `ignore_unknown` lets records skip unknown keys."""

    def __init__(self, converter: Converter, ignore_unknown: bool) -> None:
        self._converter = converter
        self.ignore_unknown = ignore_unknown

    def of(self, kind: Any) -> Form:
        """The form of `kind`.  Raises SerializationError, by the type's name, when it has none."""
        wanted = Wanted(kind)
        read = self._converter.get_structure_hook(wanted)
        return Form(lambda value: read(value, kind), self._converter.get_unstructure_hook(wanted))

    def register(self, concerns: Predicate, make: Callable[[Any, Forms], Form]) -> None:
        """Types that `concerns` accepts have the form that `make` derives; a later registration goes first."""

        def is_meant(wanted: Any) -> bool:
            return isinstance(wanted, Wanted) and concerns(wanted.kind)

        def structure(wanted: Any) -> Callable[[Any, Any], Any]:
            form = make(wanted.kind, self)
            return lambda value, _: form.read(value)

        def unstructure(wanted: Any) -> Callable[[Any], Any]:
            return make(wanted.kind, self).write

        self._converter.register_structure_hook_factory(is_meant, structure)
        self._converter.register_unstructure_hook_factory(is_meant, unstructure)


def misfit(value: object, expected: str) -> SerializationError:
    """The error for a JSON value of the wrong kind; texts are not quoted, for they may be secrets."""
    return SerializationError(f"got {kind_of(value)}, expected {expected}", path="")


def within(step: str, error: SerializationError) -> SerializationError:
    """The same error, seen from one level further out."""
    return SerializationError(error.message, path=step + (error.path or ""))


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!r}" if abs(value) < 1e25 else "a number of that size"
    for kind, name in ((str, "a text"), (list, "a list"), (dict, "an object")):
        if type(value) is kind:
            return name
    return f"a {type(value).__name__}"


def shorten(text: str) -> str:
    """`text` in quotes, cut to 40 characters."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def member(key: str) -> str:
    """The step from an object to the value under `key`: `.device`, or `["any text"]`."""
    return f".{key}" if key.isidentifier() else f"[{shorten(key)}]"
