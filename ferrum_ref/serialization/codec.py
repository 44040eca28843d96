"""JSON in and out.  Clauses: TY-JSON-1, TY-JSON-15..20 (specs/json.md)."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, overload

from cattrs import Converter

from ferrum_ref.errors import SerializationError
from ferrum_ref.serialization import containers, records, scalars, special, text, variants
from ferrum_ref.serialization.form import Form, Forms

_Value = TypeVar("_Value")


class JsonCodec:
    """Reads and writes every type that upstream serialises.

    ignore_unknown   records skip keys they do not know, as upstream does; by default such a key is an error, because it
                     is most often a misspelt setting
    Safe to share between threads: nothing changes after construction but the cache of derived forms.
    """

    def __init__(self, *, ignore_unknown: bool = False) -> None:
        self._forms = Forms(Converter(), ignore_unknown)
        self._forms.register(lambda _: True, _no_form)
        for room in (containers, scalars, records, variants, special):
            room.register(self._forms)

    def to_jsonable(self, value: Any, kind: Any = None) -> Any:
        """`value` as dicts, lists, texts, numbers, bools and None; `kind` says what a bare list or dict holds.  Pure.

        Raises SerializationError with the path: a type without JSON form, a field that does not hold what it says.
        """
        wanted = _kind_of(value) if kind is None else kind
        try:
            return self._form(wanted).write(value)
        except SerializationError as error:
            text.fail("to_json", wanted, "$", error)
        except RecursionError:
            text.fail("to_json", wanted, "$", SerializationError("the value nests too deeply", path=""))

    def from_jsonable(self, kind: Any, tree: Any, *, path: str = "$") -> Any:
        """The value of type `kind` that a plain value says.  Pure.  Raises SerializationError with the path."""
        try:
            return self._form(kind).read(tree)
        except SerializationError as error:
            text.fail("from_json", kind, path, error)
        except RecursionError:
            text.fail("from_json", kind, path, SerializationError("the value nests too deeply", path=""))

    def to_json(self, value: Any, kind: Any = None, *, pretty: bool = False) -> str:
        """`value` as JSON text, in one line or indented by two.  Pure.  Raises SerializationError with the path."""
        tree = self.to_jsonable(value, kind)
        try:
            return text.render(tree, pretty)
        except SerializationError as error:
            text.fail("to_json", _kind_of(value) if kind is None else kind, "$", error)

    def from_json(self, kind: Any, content: str, *, path: str = "$") -> Any:
        """The value of type `kind` that a JSON text says; `path` is where the text stands, for errors.  Pure.

        Raises SerializationError with the path for every text that upstream could not have written, and no other error.
        """
        try:
            tree = text.parse(content)
        except SerializationError as error:
            text.fail("from_json", kind, path, error)
        return self.from_jsonable(kind, tree, path=path)

    def _form(self, kind: Any) -> Form:
        try:
            return self._forms.of(kind)
        except TypeError:
            raise SerializationError(f"{kind!r} is no type", path="") from None
        except RecursionError:
            raise SerializationError(f"{kind!r} contains itself", path="") from None


def _kind_of(value: Any) -> Any:
    return Any if value is None or type(value) in (dict, list, tuple) else type(value)


def _no_form(kind: Any, forms: Forms) -> Form:
    name = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)
    raise SerializationError(f"{name} has no JSON form", path="")


@cache
def _codec(ignore_unknown: bool) -> JsonCodec:
    return JsonCodec(ignore_unknown=ignore_unknown)


def to_json(value: Any, kind: Any = None, *, pretty: bool = False) -> str:
    """`value` as JSON text; see JsonCodec.to_json.  [TY-JSON-1]"""
    return _codec(False).to_json(value, kind, pretty=pretty)


def to_jsonable(value: Any, kind: Any = None) -> Any:
    """`value` as plain dicts, lists and scalars; see JsonCodec.to_jsonable.  [TY-JSON-1]"""
    return _codec(False).to_jsonable(value, kind)


@overload
def from_json(kind: type[_Value], content: str, *, path: str = ..., ignore_unknown: bool = ...) -> _Value: ...
@overload
def from_json(kind: Any, content: str, *, path: str = ..., ignore_unknown: bool = ...) -> Any: ...
def from_json(kind: Any, content: str, *, path: str = "$", ignore_unknown: bool = False) -> Any:
    """The value of type `kind` that a JSON text says; see JsonCodec.from_json.  [TY-JSON-1, TY-JSON-18]"""
    return _codec(ignore_unknown).from_json(kind, content, path=path)


@overload
def from_jsonable(kind: type[_Value], tree: Any, *, path: str = ..., ignore_unknown: bool = ...) -> _Value: ...
@overload
def from_jsonable(kind: Any, tree: Any, *, path: str = ..., ignore_unknown: bool = ...) -> Any: ...
def from_jsonable(kind: Any, tree: Any, *, path: str = "$", ignore_unknown: bool = False) -> Any:
    """The value of type `kind` that a plain value says; see JsonCodec.from_jsonable.  [TY-JSON-1, TY-JSON-18]"""
    return _codec(ignore_unknown).from_jsonable(kind, tree, path=path)
