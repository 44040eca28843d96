"""Damaged texts give a SerializationError or a value that is whole; never anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_strategies import JSON, derive_list, found, values_of

from ferrum_ref.errors import SerializationError
from ferrum_ref.serialization import from_json, to_json, to_jsonable

SERIALISED = [(module, name) for module, name, yes in derive_list() if yes]
REFUSED = [(module, name) for module, name, yes in derive_list() if not yes and name != "MemoryHandle"]
SPLINTERS = [
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "0",
    "-",
    "1e9",
    "NaN",
    "null",
    "true",
    '"a"',
    "\\",
    "\\ud800",
    "\x00",
    "é",
]


def survives(kind: Any, text: str) -> None:
    for ignore_unknown in (False, True):
        place: str | None = None
        try:
            value = from_json(kind, text, ignore_unknown=ignore_unknown)
        except SerializationError as error:
            place = error.path
        else:
            assert from_json(kind, to_json(value, kind)) == value
        assert place is None or place.startswith("$")


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """`text` with up to three cuts, splinters or doubled pieces."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        new = draw(st.sampled_from(["", text[start:end] * 2, *SPLINTERS]))
        text = text[:start] + new + text[end:]
    return text


@st.composite
def misplaced(draw: st.DrawFn, tree: Any) -> Any:
    """`tree` with one of its values replaced by another JSON value."""
    if draw(st.integers(0, 3)) == 0 or not isinstance(tree, (dict, list)) or not tree:
        return draw(JSON)
    if isinstance(tree, list):
        place = draw(st.integers(0, len(tree) - 1))
        return [draw(misplaced(item)) if index == place else item for index, item in enumerate(tree)]
    key = draw(st.sampled_from(sorted(tree)))
    return {name: draw(misplaced(item)) if name == key else item for name, item in tree.items()}


@pytest.mark.clause("TY-JSON-15", "TY-JSON-17")
@pytest.mark.parametrize(("module", "name"), SERIALISED, ids=lambda part: part)
def test_damaged_texts(module: str, name: str) -> None:
    damage(found(module, name), 3)


@pytest.mark.slow
@pytest.mark.clause("TY-JSON-15", "TY-JSON-17")
@pytest.mark.parametrize(("module", "name"), SERIALISED, ids=lambda part: part)
def test_many_damaged_texts(module: str, name: str) -> None:
    damage(found(module, name), 30)


def damage(kind: Any, num_examples: int) -> None:
    @settings(max_examples=num_examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        tree = to_jsonable(data.draw(values_of(kind)), kind)
        survives(kind, json.dumps(data.draw(misplaced(tree))))
        survives(kind, data.draw(damaged(json.dumps(tree, ensure_ascii=False))))

    check()


@pytest.mark.clause("TY-JSON-15")
@given(st.text(alphabet='{}[]",:0123456789.eE+-ntrufalsxNI\\ ', max_size=30))
def test_any_text(text: str) -> None:
    survives(Any, text)
    survives(dict[str, int], text)


@pytest.mark.clause("TY-JSON-13")
@pytest.mark.parametrize(("module", "name"), REFUSED, ids=lambda part: part)
def test_what_upstream_does_not_serialise_is_refused_by_name(module: str, name: str) -> None:
    with pytest.raises(SerializationError, match=rf"\b{name} (is not serialised|has no JSON form)"):
        from_json(found(module, name), "{}")
