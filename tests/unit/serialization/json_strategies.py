"""Hypothesis values for every type of the contracts, found by looking at the classes; and upstream's derive lists."""

from __future__ import annotations

import csv
import dataclasses
import enum
import importlib
import inspect
import types
import typing
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import ferrum_ref.types
from ferrum_ref.errors import FerrumError
from ferrum_ref.types import record
from ferrum_ref.types.devices import Device
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.models import ModelType
from ferrum_ref.types.record import FloatWidth, IntegerWidth
from ferrum_ref.types.sampling import ResponseFormat

TEXTS = st.text(max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def derive_list() -> list[tuple[str, str, bool]]:
    """(module, type, serialised) of every type of upstream's that exists here."""
    path = Path(__file__).parent / "upstream_serde.tsv"
    with path.open(newline="", encoding="utf-8") as lines:
        rows = [(m, n, s == "yes") for m, n, s in list(csv.reader(lines, delimiter="\t"))[1:]]
    return [row for row in rows if found(row[0], row[1]) is not None]


def found(module: str, name: str) -> Any:
    """The class of that name, None while nobody has written it."""
    path = f"ferrum_ref.{module}" if module.startswith("types.") else f"ferrum_ref.interfaces.{module}"
    try:
        return getattr(importlib.import_module(path), name, None)
    except ModuleNotFoundError:
        return None


def float32(number: float) -> float:
    """The float that is written like the float32 nearest to `number`."""
    return float(str(np.float32(number)))


def integers(low: int, limit: int) -> st.SearchStrategy[int]:
    return st.integers(max(low, 0), min(limit - 1, 200)) | st.integers(low, limit - 1) | st.just(limit - 1)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of that type."""
    if get_origin(hint) is Annotated:
        bare, note = get_args(hint)[:2]
        if isinstance(note, IntegerWidth):
            return integers(note.low, note.limit)
        if isinstance(note, FloatWidth) and note.bits == 32:
            return st.floats(width=32, allow_nan=False, allow_infinity=False).map(float32)
        return values_of(bare)
    arms = get_args(hint)
    origin = get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if arm is type(None) else values_of(arm) for arm in arms))
    if origin in (list, Sequence):
        return st.lists(values_of(arms[0]), max_size=3)
    if origin is tuple:
        if arms[-1] is Ellipsis:
            return st.lists(values_of(arms[0]), max_size=3).map(tuple)
        return st.tuples(*(values_of(arm) for arm in arms))
    if origin in (dict, Mapping):
        return st.dictionaries(values_of(arms[0]), values_of(arms[1]), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arms)
    plain = {
        Any: JSON,
        int: integers(-(2**63), 2**63),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: TEXTS,
        bytes: st.binary(max_size=8),
        datetime: st.datetimes(timezones=st.just(UTC)),
        timedelta: st.timedeltas(min_value=timedelta(0)),
        uuid.UUID: st.uuids(),
        TokenId: integers(0, 2**32).map(TokenId),
        Device: st.sampled_from([Device.CPU, Device.Metal]) | integers(0, 2**64).flatmap(of_a_gpu),
        ModelType: closed(ModelType, ModelType.Code, ModelType.Custom),
        ResponseFormat: closed(ResponseFormat, ResponseFormat.JsonSchema),
    }
    if hint in plain:
        return plain[hint]
    return values_of_class(hint)


def of_a_gpu(index: int) -> st.SearchStrategy[Device]:
    return st.sampled_from([Device.CUDA(index), Device.ROCm(index)])


def closed(kind: Any, *constructors: Any) -> st.SearchStrategy[Any]:
    constants = [item for item in vars(kind).values() if isinstance(item, kind)]
    return st.one_of(st.sampled_from(constants), *(TEXTS.map(make) for make in constructors))


def values_of_class(kind: Any) -> st.SearchStrategy[Any]:
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    if kind.__name__ == "WeightFormat":
        return st.sampled_from([kind.PyTorch, kind.Raw]) | integers(0, 2**32).map(kind.Custom)
    variants = [
        item
        for item in vars(kind).values()
        if (inspect.isclass(item) and issubclass(item, kind)) or isinstance(item, kind)
    ]
    if variants:
        return st.one_of(*(values_of_class(v) if inspect.isclass(v) else st.just(v) for v in variants))
    return records(kind)


@st.composite
def records(draw: st.DrawFn, kind: Any) -> Any:
    """A dataclass with any fields that its own checks accept; monotonic times stay unset."""
    fields = {}
    hints = hints_of(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.name != "last_operation":
            fields[field.name] = draw(values_of(hints[field.name]))
        elif field.init:
            fields[field.name] = None
    try:
        return kind(**fields)
    except FerrumError:
        assume(False)


def hints_of(kind: Any) -> dict[str, Any]:
    names: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(kind, localns=names, include_extras=True)
        except NameError as error:
            names[error.name] = getattr(ferrum_ref.types, error.name, None) or getattr(record, error.name)
