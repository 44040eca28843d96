"""Forms of options, lists, tuples, sets and maps.  Clauses: TY-JSON-8..9 (specs/json.md)."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from ferrum_ref.errors import SerializationError
from ferrum_ref.serialization.form import Form, Forms, member, misfit, within
from ferrum_ref.serialization.keys import Key, key_of


def register(forms: Forms) -> None:
    """Make the forms of this file known."""
    forms.register(lambda kind: _origin(kind) in (list, Sequence), _list)
    forms.register(lambda kind: _origin(kind) in (set, frozenset), _set)
    forms.register(lambda kind: _origin(kind) is tuple, _tuple)
    forms.register(lambda kind: _origin(kind) in (dict, Mapping), _map)
    forms.register(_is_literal, _literal)
    forms.register(_is_union, _option)


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def is_option(kind: Any) -> bool:
    """`X | None`."""
    return _is_union(kind) and type(None) in get_args(kind)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _option(kind: Any, forms: Forms) -> Form:
    kinds = [arm for arm in get_args(kind) if arm is not type(None)]
    if len(kinds) != 1 or not is_option(kind):
        raise SerializationError(f"{kind} is a choice of several types, which has no JSON form", path="")
    inner = forms.of(kinds[0])
    return Form(
        lambda value: None if value is None else inner.read(value),
        lambda value: None if value is None else inner.write(value),
    )


def _literal(kind: Any, _: Forms) -> Form:
    allowed = get_args(kind)

    def known(value: Any) -> Any:
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise misfit(value, f"one of {', '.join(map(repr, allowed))}")
        return value

    return Form(known, known)


def _each(convert: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    done: list[Any] = []
    try:
        for item in items:
            done.append(convert(item))
    except SerializationError as error:
        raise within(f"[{len(done)}]", error) from None
    return done


def _list(kind: Any, forms: Forms) -> Form:
    inner = forms.of(next(iter(get_args(kind)), Any))

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise misfit(value, "a list")
        return _each(inner.read, value)

    def write(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise misfit(value, "a list")
        return _each(inner.write, value)

    return Form(read, write)


def _set(kind: Any, forms: Forms) -> Form:
    listed, build = _list(kind, forms), _origin(kind)

    def read(value: Any) -> Any:
        found = listed.read(value)
        if len(build(found)) != len(found):
            raise SerializationError("the same element stands there twice", path="")
        return build(found)

    def write(value: Any) -> list[Any]:
        if not isinstance(value, (set, frozenset)):
            raise misfit(value, "a set")
        return sorted(listed.write(list(value)), key=lambda item: (type(item).__name__, str(item)))

    return Form(read, write)


def _tuple(kind: Any, forms: Forms) -> Form:
    arms = get_args(kind)
    if len(arms) == 2 and arms[1] is Ellipsis:
        listed = _list(list[arms[0]], forms)  # type: ignore[valid-type]
        return Form(lambda value: tuple(listed.read(value)), listed.write)
    inner = [forms.of(arm) for arm in arms]

    def walk(value: Any, converters: list[Callable[[Any], Any]]) -> list[Any]:
        if len(value) != len(converters):
            raise SerializationError(f"got {len(value)} elements, expected {len(converters)}", path="")
        pairs = iter(converters)
        return _each(lambda item: next(pairs)(item), value)

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise misfit(value, f"a list of {len(inner)}")
        return tuple(walk(value, [form.read for form in inner]))

    def write(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise misfit(value, f"a tuple of {len(inner)}")
        return walk(value, [form.write for form in inner])

    return Form(read, write)


def _map(kind: Any, forms: Forms) -> Form:
    key_kind, value_kind = get_args(kind) or (str, Any)
    key, inner = key_of(key_kind, forms), forms.of(value_kind)
    return Form(lambda value: _read_map(value, key, inner), lambda value: _write_map(value, key, inner))


def _read_map(value: Any, key: Key, inner: Form) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise misfit(value, "an object")
    found: dict[Any, Any] = {}
    for text, item in value.items():
        try:
            if not isinstance(text, str):
                raise misfit(text, "a text as key")
            named = key.read(text)
            if named in found:
                raise SerializationError("the same key stands there twice, written differently", path="")
            found[named] = inner.read(item)
        except SerializationError as error:
            raise within(member(str(text)), error) from None
    return found


def _write_map(value: Any, key: Key, inner: Form) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise misfit(value, "an object")
    written: dict[str, Any] = {}
    for name, item in value.items():
        text = key.write(name)
        try:
            written[text] = inner.write(item)
        except SerializationError as error:
            raise within(member(text), error) from None
    return written
