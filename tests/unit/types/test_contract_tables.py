"""Every record and enum of the data crate against a transcript of upstream's tables: names, order, widths, defaults."""

from __future__ import annotations

import csv
import dataclasses
import enum
import importlib
import types
import typing
from collections import defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

import ferrum_ref.types
from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.metrics import TrendDirection
from ferrum_ref.types.record import FloatWidth, IntegerWidth

HERE = Path(__file__).parent
Row = tuple[str, str, str]


def table(name: str) -> dict[tuple[str, str], list[Row]]:
    found: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    with (HERE / name).open(newline="", encoding="utf-8") as lines:
        for module, owner, *rest in list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]:
            found[module, owner].append((rest[0], rest[1], rest[2] if len(rest) > 2 else ""))
    return dict(found)


STRUCTS = table("upstream_fields.tsv")
ENUMS = table("upstream_variants.tsv")
WIDTHS = {IntegerWidth(0, 2**b): f"u{b}" for b in (8, 32, 64)} | {FloatWidth(b): f"f{b}" for b in (32, 64)}


def home(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"ferrum_ref.types.{module}"), name)


def described(hint: Any) -> str:
    """A field's type in the words of the transcript."""
    if get_origin(hint) is Annotated:
        return WIDTHS[get_args(hint)[1]]
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("None" if arm is type(None) else described(arm) for arm in get_args(hint))
    if get_origin(hint) is not None:
        return f"{get_origin(hint).__name__}[{', '.join(described(arm) for arm in get_args(hint))}]"
    return "Any" if hint is Any else str(hint.__name__)


def default_of(text: str) -> Any:
    if text == "Stable":
        return TrendDirection.Stable
    if text.startswith("greedy"):
        return home("sampling", "SamplingPresets")().presets
    return eval(text, {**vars(ferrum_ref.types), "timedelta": timedelta})


@pytest.mark.clause("TY-RECORD-3")
def test_the_transcript_is_whole() -> None:
    assert (len(STRUCTS), sum(map(len, STRUCTS.values()))) == (72, 400)
    assert (len(ENUMS), sum(map(len, ENUMS.values()))) == (19, 92)


@pytest.mark.clause("TY-RECORD-3", "TY-METRICS-4", "TY-CONFIG-1")
@pytest.mark.parametrize(("module", "name"), STRUCTS, ids=lambda part: part)
def test_fields_are_upstreams_in_order_width_and_default(module: str, name: str) -> None:
    record = home(module, name)
    rows = STRUCTS[module, name]
    fields = dataclasses.fields(record)
    assert [f.name for f in fields] == [row[0] for row in rows]
    hints = typing.get_type_hints(record, include_extras=True)
    for field, (_, kind, default) in zip(fields, rows):
        assert described(hints[field.name]) == kind, field.name
        if default == "required":
            assert field.default is dataclasses.MISSING, field.name
            assert field.default_factory is dataclasses.MISSING, field.name
        elif field.default_factory is not dataclasses.MISSING:
            assert field.default_factory() == default_of(default), field.name
        else:
            assert field.default == default_of(default), field.name
            assert type(field.default) is type(default_of(default)), field.name


@pytest.mark.clause("TY-RECORD-3")
@pytest.mark.parametrize(("module", "name"), ENUMS, ids=lambda part: part)
def test_variants_are_upstreams(module: str, name: str) -> None:
    kind = home(module, name)
    names = [row[0] for row in ENUMS[module, name]]
    if issubclass(kind, enum.Enum):
        assert [item.name.rstrip("_") for item in kind] == names
    else:
        assert all(hasattr(kind, variant) for variant in names)
        assert sorted(v for v in vars(kind) if v[0].isupper()) == sorted(names)


def example(kind: str) -> Any:
    """Any value that a field of that kind takes."""
    known = {"u8": 1, "u32": 1, "u64": 1, "f32": 0.5, "f64": 0.5, "bool": True, "str": "x", "datetime": datetime.min}
    return known.get(kind, {} if kind.startswith("dict") else [] if kind.startswith("list") else None)


COUNTS = [
    (module, name, row[0], row[1])
    for (module, name), rows in STRUCTS.items()
    for row in rows
    if row[1].split(" ")[0] in ("u8", "u32", "u64")
]


@pytest.mark.clause("TY-RECORD-1")
@pytest.mark.parametrize(("module", "name", "field", "kind"), COUNTS, ids=lambda part: part)
def test_every_count_refuses_what_its_width_cannot_hold(module: str, name: str, field: str, kind: str) -> None:
    record = home(module, name)
    fields = {row[0]: example(row[1]) for row in STRUCTS[module, name]}
    limit = 2 ** int(kind.split(" ")[0][1:])
    record(**{**fields, field: limit - 1})
    for wrong in (-1, limit, 1.5, "1"):
        with pytest.raises(InvalidParameterError, match=field):
            record(**{**fields, field: wrong})
