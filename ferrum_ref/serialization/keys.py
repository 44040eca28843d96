"""Keys of maps: JSON objects have texts as keys only.  Clause: TY-JSON-9 (specs/json.md; D-35)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ferrum_ref.errors import InvalidParameterError, SerializationError
from ferrum_ref.serialization.form import Forms, misfit, shorten
from ferrum_ref.types.devices import Device

WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,19})")


@dataclass(frozen=True, slots=True)
class Key:
    """`read` turns the text of a key into the key, `write` the other way; both raise SerializationError."""

    read: Callable[[str], Any]
    write: Callable[[Any], str]


def key_of(kind: Any, forms: Forms) -> Key:
    """Devices by `str(device)`; other types as their values are written, numbers as decimal text.  [TY-JSON-9; D-35]"""
    if kind is Device:
        return Key(_read_device, _write_device)
    form = forms.of(kind)

    def read(text: str) -> Any:
        try:
            return form.read(text)
        except SerializationError:
            if not WHOLE.fullmatch(text) or text == "-0":
                raise
        return form.read(int(text))

    def write(value: Any) -> str:
        written = form.write(value)
        if isinstance(written, str):
            return written
        if isinstance(written, int) and not isinstance(written, bool):
            return str(written)
        raise misfit(written, "a text or an integer as key")

    return Key(read, write)


def _read_device(text: str) -> Device:
    """As written here; upstream's own `CPU` and `Metal` too (it cannot write any other)."""
    if text in ("CPU", "Metal"):
        return cast(Device, getattr(Device, text))
    try:
        device = Device.parse(text)
    except InvalidParameterError:
        device = None
    if device is None or str(device) != text:
        raise SerializationError(
            f"the key {shorten(text)} is no device; expected cpu, metal, cuda:N or rocm:N", path=""
        )
    return device


def _write_device(value: Any) -> str:
    if not isinstance(value, Device):
        raise misfit(value, "a device as key")
    return str(value)
