"""Every type of the contracts comes back from its JSON text as it was."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_strategies import derive_list, found, values_of

import ferrum_ref.types
from ferrum_ref import errors
from ferrum_ref.errors import FerrumError, SerializationError
from ferrum_ref.serialization import from_json, from_jsonable, to_json, to_jsonable
from ferrum_ref.types.config import KvCacheConfig
from ferrum_ref.types.models import LocalSource, ModelSource
from ferrum_ref.types.sampling import SamplingParams

SERIALISED = [(module, name) for module, name, yes in derive_list() if yes]
ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if FerrumError in c.__bases__]


def types_of_the_data_crate() -> list[type]:
    """Every dataclass that `ferrum_ref.types` defines, whether upstream has it or not."""
    here = []
    for info in pkgutil.walk_packages(ferrum_ref.types.__path__, "ferrum_ref.types."):
        module = importlib.import_module(info.name)
        here += [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == info.name]
    helpers = ("IntegerWidth", "FloatWidth", "MonotonicClock", "UuidKey", "TextKey", "ScheduledRequest", "Algorithm")
    return [c for c in here if isinstance(c, type) and c.__name__ not in helpers]


def test_the_list_of_types_is_not_empty() -> None:
    assert len(SERIALISED) >= 150
    assert len(types_of_the_data_crate()) >= 80


@pytest.mark.clause("TY-JSON-1", "TY-JSON-20")
@pytest.mark.parametrize(("module", "name"), SERIALISED, ids=lambda part: part)
def test_round_trip(module: str, name: str) -> None:
    round_trip(found(module, name), 5)


@pytest.mark.slow
@pytest.mark.clause("TY-JSON-1", "TY-JSON-20")
@pytest.mark.parametrize(("module", "name"), SERIALISED, ids=lambda part: part)
def test_many_round_trips(module: str, name: str) -> None:
    round_trip(found(module, name), 40)


def round_trip(kind: Any, num_examples: int) -> None:
    @settings(max_examples=num_examples)
    @given(values_of(kind))
    def check(value: Any) -> None:
        text = to_json(value, kind)
        assert from_json(kind, text) == value
        assert to_json(from_json(kind, text), kind) == text
        assert json.loads(text) == to_jsonable(value, kind)
        assert from_jsonable(kind, to_jsonable(value, kind)) == value
        assert from_json(kind, to_json(value, kind, pretty=True)) == value

    check()


@pytest.mark.clause("TY-JSON-1")
@pytest.mark.parametrize("kind", types_of_the_data_crate(), ids=lambda kind: kind.__name__)
def test_round_trip_by_the_values_own_class(kind: type) -> None:
    @settings(max_examples=2)
    @given(values_of(kind))
    def check(value: Any) -> None:
        assert from_json(kind, to_json(value)) == value

    check()


@pytest.mark.clause("TY-JSON-14")
@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_round_trip(kind: type[FerrumError]) -> None:
    @settings(max_examples=5)
    @given(st.text())
    def check(message: str) -> None:
        text = to_json(kind(message))
        assert json.loads(text) == {kind.kind: {"message": message}}
        for asked in (kind, FerrumError):
            back = from_json(asked, text)
            assert (type(back), back.message) == (kind, message)

    check()


@pytest.mark.clause("TY-JSON-3")
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_field_keeps_its_float32_and_is_written_at_its_shortest(number: float) -> None:
    text = to_json(SamplingParams(temperature=number))
    back = from_json(SamplingParams, text).temperature
    assert np.float32(back) == np.float32(number)
    assert np.signbit(back) == np.signbit(number)
    written = text.split('"temperature":')[1].split(",")[0]
    digits = len(written.split("e")[0].strip("-").replace(".", "").strip("0"))
    with np.errstate(over="ignore"):
        for fewer in range(digits - 1, 0, -1):
            assert np.float32(f"{number:.{fewer - 1}e}") != np.float32(number)
    assert to_json(SamplingParams(temperature=back)) == text


@pytest.mark.clause("TY-JSON-12")
def test_a_variant_by_itself_is_written_as_its_enum_and_read_as_itself_only() -> None:
    text = to_json(ModelSource.Local("/models"))
    assert text == '{"Local":"/models"}'
    assert from_json(LocalSource, text) == from_json(ModelSource, text) == ModelSource.Local("/models")
    with pytest.raises(SerializationError, match="expected a LocalSource"):
        from_json(LocalSource, to_json(ModelSource.Url("u", {})))


@pytest.mark.clause("TY-JSON-2")
@given(st.integers(2**53, 2**64 - 1))
def test_large_integers_are_exact(number: int) -> None:
    text = to_json(KvCacheConfig(max_blocks=number))
    assert f'"max_blocks":{number},' in text
    assert from_json(KvCacheConfig, text).max_blocks == number
