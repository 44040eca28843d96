"""Forms that upstream writes by a rule of their own: ResponseFormat and errors.  Clause: TY-JSON-14 (specs/json.md)."""

from __future__ import annotations

import inspect
from typing import Any

from ferrum_ref import errors
from ferrum_ref.errors import FerrumError, SerializationError
from ferrum_ref.serialization.form import Form, Forms, kind_of, misfit, within
from ferrum_ref.serialization.records import build, expect
from ferrum_ref.serialization.variants import Payload, tagged
from ferrum_ref.types.sampling import ResponseFormat


def register(forms: Forms) -> None:
    """Make the forms of this file known."""
    forms.register(lambda kind: kind is ResponseFormat, _response_format)
    forms.register(lambda kind: inspect.isclass(kind) and issubclass(kind, FerrumError), _error)


def _response_format(_: Any, forms: Forms) -> Form:
    """Adjacently tagged: {"type": "Text"}, {"type": "JsonSchema", "schema": "..."}.  [TY-JSON-14]"""
    text = forms.of(str)

    def read(value: Any) -> ResponseFormat:
        if not isinstance(value, dict):
            raise misfit(value, 'an object with the key "type"')
        for key in value:
            if key not in ("type", "schema") and not forms.ignore_unknown:
                raise SerializationError("ResponseFormat has the keys type and schema only", path=f".{key}")
        if value.get("type") not in ("Text", "JsonObject", "JsonSchema"):
            reason = f"got {kind_of(value.get('type'))}, expected Text, JsonObject or JsonSchema"
            raise SerializationError(reason, path=".type")
        fields = {}
        for key in ("type", "schema"):
            if key in value:
                try:
                    fields[key] = text.read(value[key])
                except SerializationError as error:
                    raise within(f".{key}", error) from None
        return build(ResponseFormat, fields)  # type: ignore[no-any-return]

    def write(value: Any) -> dict[str, Any]:
        shape = expect(value, ResponseFormat)
        written = {"type": shape.type}
        return written if shape.schema is None else {**written, "schema": text.write(shape.schema)}

    return Form(read, write)


def _error(kind: type[FerrumError], forms: Forms) -> Form:
    """{"NotFound": {"message": "..."}}; a class below a kind is written as that kind.  [TY-JSON-14]"""
    members = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, FerrumError)]
    kinds = [cls for cls in members if FerrumError in cls.__bases__]
    text = forms.of(str)

    def payload(cls: type[FerrumError]) -> Payload:
        def read(value: Any) -> FerrumError:
            if not isinstance(value, dict) or set(value) != {"message"}:
                raise misfit(value, "an object with the key message")
            try:
                return cls(text.read(value["message"]))
            except SerializationError as error:
                raise within(".message", error) from None

        def write(value: FerrumError) -> tuple[Any] | None:
            return ({"message": text.write(value.message)},) if value.kind == cls.kind else None

        return Payload(read, write)

    whole = tagged(FerrumError, {}, {cls.kind: payload(cls) for cls in kinds}, lambda _: None)
    return Form(lambda value: expect(whole.read(value), kind), lambda value: whole.write(expect(value, kind)))
