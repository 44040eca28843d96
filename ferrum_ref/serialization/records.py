"""Forms of dataclasses: structs as objects, tuple structs of one value as that value.

Clauses: TY-JSON-1, TY-JSON-10..11, TY-JSON-13 (specs/json.md).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from ferrum_ref.errors import FerrumError, SerializationError
from ferrum_ref.serialization.annotations import hints_of, is_data
from ferrum_ref.serialization.containers import is_option
from ferrum_ref.serialization.derives import DERIVED, SKIPPED, is_refused
from ferrum_ref.serialization.form import Form, Forms, member, misfit, shorten, within
from ferrum_ref.types.record import MonotonicClock


@dataclass(frozen=True, slots=True)
class Member:
    """One field of a record as JSON sees it; without keys it is left out, and None when read."""

    name: str
    keys: tuple[str, ...]
    form: Form
    optional: bool
    default: tuple[Any, ...] = ()
    derived: bool = False

    def find(self, value: dict[str, Any]) -> Any:
        """The field's value in an object, typed.  Raises SerializationError when it is missing or wrong."""
        present = [key for key in self.keys if key in value]
        if len(present) > 1:
            raise SerializationError(f"{' and '.join(present)} are the same field; expected one of them", path="")
        if present:
            try:
                return self.form.read(value[present[0]])
            except SerializationError as error:
                raise within(member(present[0]), error) from None
        if self.default:
            return self.default[0]
        if self.optional:
            return None
        raise SerializationError(f"the key {self.keys[0]!r} is missing", path="")


def register(forms: Forms) -> None:
    """Make the forms of this file known."""
    forms.register(is_data, record_form)
    forms.register(_is_subclass_of_int, _number)


def _is_subclass_of_int(kind: Any) -> bool:
    return (
        inspect.isclass(kind)
        and issubclass(kind, int)
        and kind not in (int, bool)
        and not hasattr(kind, "_member_map_")
    )


def _number(kind: Any, forms: Forms) -> Form:
    """A number with a name of its own, as TokenId.  [TY-JSON-1]"""
    inner = forms.of(int)

    def write(value: Any) -> Any:
        return inner.write(expect(value, kind))

    return Form(lambda value: build(kind, {"value": inner.read(value)}), write)


def expect(value: Any, kind: type) -> Any:
    """`value` if it is a `kind`.  Raises SerializationError otherwise."""
    if not isinstance(value, kind):
        raise misfit(value, f"a {kind.__name__}")
    return value


def build(kind: Any, fields: dict[str, Any]) -> Any:
    """The record of these fields; what its own checks refuse is a SerializationError."""
    try:
        return kind(**fields)
    except FerrumError as error:
        raise SerializationError(error.message, path="") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise SerializationError(f"{kind.__name__}: {error}", path="") from None


def record_form(kind: Any, forms: Forms) -> Form:
    """The form of a dataclass, refused by name when upstream does not serialise it.  [TY-JSON-10..11, TY-JSON-13]"""
    if is_refused(kind):
        raise SerializationError(f"{kind.__name__} is not serialised, here as upstream", path="")
    if is_wrapper(kind):
        return _wrapper(kind, dataclasses.fields(kind)[0].name, forms)
    return object_form(kind, forms)


def is_wrapper(kind: Any) -> bool:
    """A tuple struct around one value: its only field is called `value`, or `_0` as upstream has it."""
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return len(names) == 1 and (names[0] in ("value", "_0") or hasattr(kind, "_0"))


def _wrapper(kind: Any, name: str, forms: Forms) -> Form:
    inner = forms.of(hints_of(kind)[name])
    return Form(
        lambda value: build(kind, {name: inner.read(value)}),
        lambda value: inner.write(getattr(expect(value, kind), name)),
    )


def object_form(kind: Any, forms: Forms) -> Form:
    """One key a field, under upstream's names and in upstream's order.  [TY-JSON-10..11]"""
    resolved = cache(lambda: _members(kind, forms))  # at first use: a record may hold its own kind
    return Form(
        lambda value: _read(value, kind, resolved(), forms.ignore_unknown),
        lambda value: _write(expect(value, kind), resolved()),
    )


def _members(kind: Any, forms: Forms) -> list[Member]:
    hints = hints_of(kind)
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if not field.init:
            continue
        if (kind.__name__, field.name) in SKIPPED or _is_clock(hint):
            if is_option(hint):
                found.append(Member(field.name, (), Form(_nothing, _nothing), True))
            continue
        keys = (field.metadata.get("json", field.name.rstrip("_")), *field.metadata.get("json_aliases", ()))
        default = (field.default,) if field.metadata.get("json_default") else ()
        found.append(Member(field.name, keys, _field_form(kind, field.name, hint, forms), is_option(hint), default))
    for name in DERIVED.get(kind.__name__, ()):
        form = _field_form(kind, name, hints_of(getattr(kind, name).fget)["return"], forms)
        found.append(Member(name, (name,), form, False, derived=True))
    return found


def _nothing(value: Any) -> None:
    """Form of a field that is left out: None when read."""


def _is_clock(hint: Any) -> bool:
    arms = get_args(hint) if is_option(hint) else (hint,)
    return any(isinstance(n, MonotonicClock) for a in arms if get_origin(a) is Annotated for n in get_args(a)[1:])


def _field_form(kind: Any, name: str, hint: Any, forms: Forms) -> Form:
    try:
        return forms.of(hint)
    except SerializationError as error:
        reason = f"{kind.__name__}.{name} cannot be serialised: {error.message}"
        raise SerializationError(reason, path="") from None


def _read(value: Any, kind: Any, members: list[Member], ignore_unknown: bool) -> Any:
    if not isinstance(value, dict):
        raise misfit(value, f"an object ({kind.__name__})")
    known = [key for found in members for key in found.keys]
    if not ignore_unknown:
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                remedy = f"; did you mean {near[0]!r}?" if near else ""
                reason = f"{kind.__name__} has no key {shorten(str(key))}{remedy}"
                raise SerializationError(reason, path=member(str(key)))
    fields = {found.name: (found.find(value), found.derived) for found in members}
    return build(kind, {name: item for name, (item, derived) in fields.items() if not derived})


def _write(value: Any, members: list[Member]) -> dict[str, Any]:
    written = {}
    for found in members:
        if not found.keys:
            continue
        try:
            written[found.keys[0]] = found.form.write(getattr(value, found.name))
        except SerializationError as error:
            raise within(member(found.keys[0]), error) from None
    return written
