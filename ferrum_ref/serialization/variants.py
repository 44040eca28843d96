"""Forms of enums: unit variants as their bare names, variants with a payload externally tagged.

Three shapes of Python class stand for a Rust enum:
    enum.Enum                                  unit variants only
    a class whose attributes are dataclasses   `ModelSource.Local`, `QuantizationConfig.GPTQ`, ...
    a dataclass with constants of its own type and constructors in capitals   `Device.CPU`, `Device.CUDA(0)`
Clauses: TY-JSON-12, TY-JSON-14 (specs/json.md).
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from ferrum_ref.errors import FerrumError, SerializationError
from ferrum_ref.serialization.annotations import hints_of, is_data
from ferrum_ref.serialization.derives import TUPLE_VARIANTS, is_refused, variant_name
from ferrum_ref.serialization.form import Form, Forms, kind_of, member, shorten, within
from ferrum_ref.serialization.records import expect, is_wrapper, object_form


@dataclass(frozen=True, slots=True)
class Payload:
    """A variant with a payload: `read` makes the value from it, `write` takes it out (None: another variant)."""

    read: Callable[[Any], Any]
    write: Callable[[Any], tuple[Any] | None]


def register(forms: Forms) -> None:
    """Make the forms of this file known."""
    forms.register(lambda kind: inspect.isclass(kind) and issubclass(kind, enum.Enum), _unit_enum)
    forms.register(lambda kind: inspect.isclass(kind) and bool(_classes_of(kind)), _namespace)
    forms.register(lambda kind: owner_of(kind) is not None, _variant_class)
    forms.register(
        lambda kind: is_data(kind) and bool(_constants_of(kind) or _constructors_of(kind)), _closed_dataclass
    )


def _refuse(kind: type) -> None:
    if is_refused(kind):
        raise SerializationError(f"{kind.__name__} is not serialised, here as upstream", path="")


# enum.Enum


def _unit_enum(kind: type[enum.Enum], forms: Forms) -> Form:
    _refuse(kind)
    names = {unit_name(item): item for item in kind}
    return tagged(kind, names, {}, lambda value: unit_name(value))


def unit_name(item: enum.Enum) -> str:
    """Upstream's name of a variant: the value where that is a capitalised name, else the member's own.  [TY-JSON-12]"""
    value = item.value
    if isinstance(value, str) and value.isidentifier() and value[0].isupper():
        return value
    return variant_name(type(item).__name__, item.name)


# classes whose attributes are the variants


def _classes_of(kind: type) -> Mapping[str, type]:
    """Variant classes by their names here."""
    found = {}
    for name, item in vars(kind).items():
        if name[0].isupper() and is_data(item):
            nested = item.__qualname__ == f"{kind.__qualname__}.{name}" and item.__module__ == kind.__module__
            if item is not kind and (issubclass(item, kind) or nested):
                found[name] = item
    return found


def owner_of(kind: Any) -> type | None:
    """The enum that `kind` is a variant class of."""
    if not is_data(kind):
        return None
    outer = kind.__qualname__.rpartition(".")[0]
    nesting = getattr(sys.modules.get(kind.__module__), outer, None) if outer else None
    for owner in (*kind.__mro__[1:], nesting):
        if not inspect.isclass(owner) or owner is kind:
            continue
        if kind in (*_classes_of(owner).values(), *map(type, _constants_of(owner).values())):
            return owner
    return None


def _namespace(kind: type, forms: Forms) -> Form:
    _refuse(kind)
    units: dict[str, Any] = {}
    payloads: dict[str, Payload] = {}
    for name, variant in _classes_of(kind).items():
        title = variant_name(kind.__name__, name)
        if fields(variant):
            payloads[title] = _class_payload(kind, name, variant, forms)
        else:
            units[title] = variant()
    units.update(_constants_of(kind))
    owned = (kind, *_classes_of(kind).values())
    return tagged(owned, units, payloads, lambda value: _title(units, value))


def _class_payload(kind: type, name: str, variant: type, forms: Forms) -> Payload:
    form = object_form(variant, forms)
    if (kind.__name__, name) in TUPLE_VARIANTS or is_wrapper(variant):
        only = fields(variant)[0].name
        inner = forms.of(hints_of(variant)[only])
        form = Form(lambda value: variant(inner.read(value)), lambda value: inner.write(getattr(value, only)))
    return Payload(form.read, lambda value: (form.write(value),) if type(value) is variant else None)


def _variant_class(kind: type, forms: Forms) -> Form:
    """A variant by itself is written with its enum's tag, and read as that enum."""
    whole = forms.of(owner_of(kind))
    return Form(lambda value: expect(whole.read(value), kind), lambda value: whole.write(expect(value, kind)))


# dataclasses with constants and constructors


def _constants_of(kind: type) -> dict[str, Any]:
    """Constants of a class that are values of it, by upstream's names."""
    return {
        variant_name(kind.__name__, name): item
        for name, item in vars(kind).items()
        if name[0].isupper() and isinstance(item, kind)
    }


def _constructors_of(kind: type) -> dict[str, Callable[..., Any]]:
    """Static and class methods named in capitals that return the class itself."""
    found = {}
    for name, item in vars(kind).items():
        if name[0].isupper() and isinstance(item, (staticmethod, classmethod)):
            returned = inspect.signature(item.__func__).return_annotation
            if returned in (kind, kind.__name__, "Self"):
                found[name] = cast("Callable[..., Any]", getattr(kind, name))
    return found


def _closed_dataclass(kind: type, forms: Forms) -> Form:
    _refuse(kind)
    units = _constants_of(kind)
    payloads: dict[str, Payload] = {}
    for name, make in _constructors_of(kind).items():
        title = variant_name(kind.__name__, name)
        parameters = list(inspect.signature(make).parameters)
        if parameters:
            payloads[title] = _call_payload(kind, make, parameters, forms)
        else:
            units[title] = make()
    aliases = [n for n, item in units.items() if any(p.write(item) is not None for p in payloads.values())]
    units = {name: item for name, item in units.items() if name not in aliases}
    return tagged(kind, units, payloads, lambda value: _title(units, value))


def _call_payload(kind: type, make: Callable[..., Any], parameters: list[str], forms: Forms) -> Payload:
    hints = hints_of(make)
    inner = {name: forms.of(hints[name]) for name in parameters}
    held = [field.name for field in fields(kind)]
    sources = parameters if set(parameters) <= set(held) else held[1 : 1 + len(parameters)]

    def construct(arguments: list[Any]) -> Any:
        try:
            return make(*arguments)
        except FerrumError as error:
            raise SerializationError(error.message, path="") from None

    def read(value: Any) -> Any:
        if len(parameters) == 1:
            return construct([inner[parameters[0]].read(value)])
        if not isinstance(value, dict) or set(value) != set(parameters):
            raise SerializationError(f"got {kind_of(value)}, expected an object of {', '.join(parameters)}", path="")
        arguments = []
        for name in parameters:
            try:
                arguments.append(inner[name].read(value[name]))
            except SerializationError as error:
                raise within(member(name), error) from None
        return construct(arguments)

    def write(value: Any) -> tuple[Any] | None:
        arguments = [getattr(value, name) for name in sources]
        try:
            if make(*arguments) != value:
                return None
        except FerrumError:
            return None
        written = {name: inner[name].write(item) for name, item in zip(parameters, arguments)}
        return (written if len(parameters) > 1 else written[parameters[0]],)

    return Payload(read, write)


# the tags


def _title(units: Mapping[str, Any], value: Any) -> str | None:
    return next((name for name, item in units.items() if type(item) is type(value) and item == value), None)


def tagged(
    kind: Any, units: Mapping[str, Any], payloads: Mapping[str, Payload], name_of: Callable[[Any], str | None]
) -> Form:
    """`"Name"` for a unit variant, `{"Name": payload}` for another.  [TY-JSON-12]"""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    known = ", ".join([*units, *payloads])

    def read(value: Any) -> Any:
        if isinstance(value, str):
            if value in units:
                return units[value]
            if value in payloads:
                raise SerializationError(f"the variant {value} needs a payload: {{{value!r}: ...}}", path="")
            raise SerializationError(f"got {shorten(value)}, expected one of {known}", path="")
        if not isinstance(value, dict) or len(value) != 1:
            raise SerializationError(
                f"got {kind_of(value)}, expected a variant of {kinds[0].__name__}: {known}", path=""
            )
        name, payload = next(iter(value.items()))
        if name in units:
            raise SerializationError(f"the variant {name} has no payload; expected {name!r}", path="")
        if name not in payloads:
            raise SerializationError(f"got {shorten(str(name))}, expected one of {known}", path="")
        try:
            return payloads[name].read(payload)
        except SerializationError as error:
            raise within(member(name), error) from None

    def write(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise SerializationError(f"got {kind_of(value)}, expected a {kinds[0].__name__}", path="")
        for name, payload in payloads.items():
            try:
                written = payload.write(value)
            except SerializationError as error:
                raise within(member(name), error) from None
            if written is not None:
                return {name: written[0]}
        found = name_of(value)
        if found is None:
            raise SerializationError(f"got a value of {kinds[0].__name__} that is none of {known}", path="")
        return found

    return Form(read, write)
