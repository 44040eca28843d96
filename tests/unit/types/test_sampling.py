"""Sampling parameters: domains and defaults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, RequestValidationError
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.sampling import MirostatParams, Priority, ResponseFormat, SamplingParams, SamplingPresets


@pytest.mark.clause("TY-SAMPLING-1")
def test_defaults() -> None:
    params = SamplingParams()
    assert dataclasses.astuple(params) == (
        512, 1.0, 1.0, None, 1.0, 0.0, 0.0, [], None, None, None, None, None, ("Text", None),
    )  # fmt: skip
    assert SamplingParams.greedy() == dataclasses.replace(params, temperature=0.0)
    assert SamplingParams.with_temperature(0.3) == dataclasses.replace(params, temperature=0.3)
    params.validate()


INSIDE: list[dict[str, Any]] = [
    {"max_tokens": 1}, {"temperature": 0.0}, {"temperature": 5}, {"top_p": 1e-9}, {"top_k": 1},
    {"repetition_penalty": 1e-3}, {"presence_penalty": -2.0}, {"frequency_penalty": 2.0}, {"min_p": 1.0},
    {"tfs": 0.5}, {"typical_p": 0.2}, {"stop_sequences": ["a"]}, {"mirostat": MirostatParams(2, 5.0, 0.1)},
]  # fmt: skip
OUTSIDE: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_k": 0},
    {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0}, {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1}, {"min_p": 0.0}, {"tfs": 1.5}, {"typical_p": -0.2}, {"stop_sequences": [""]},
    {"stop_sequences": [3]}, {"temperature": "hot"}, {"temperature": True},
    {"mirostat": MirostatParams(3, 5.0, 0.1)}, {"mirostat": MirostatParams(1, 0.0, 0.1)},
    {"mirostat": MirostatParams(1, 5.0, -0.1)},
]  # fmt: skip


@pytest.mark.clause("TY-SAMPLING-2")
@pytest.mark.parametrize("fields", INSIDE, ids=str)
def test_inside_the_domain(fields: dict[str, Any]) -> None:
    SamplingParams(**fields).validate()


@pytest.mark.clause("TY-SAMPLING-2")
@pytest.mark.parametrize("fields", OUTSIDE, ids=str)
def test_outside_the_domain_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestValidationError, match=next(iter(fields))):
        SamplingParams(**fields).validate()


FLOATS = ["temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@pytest.mark.clause("TY-SAMPLING-3")
@pytest.mark.parametrize("name", [*FLOATS, "min_p", "tfs", "typical_p"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_lies_in_no_domain(name: str, value: float) -> None:
    with pytest.raises(RequestValidationError, match=name):
        SamplingParams(**{name: value}).validate()  # type: ignore[arg-type]


@pytest.mark.clause("TY-SAMPLING-2", "TY-SAMPLING-3")
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_validate_accepts_exactly_the_nucleus_domain(p: float) -> None:
    accepted = True
    try:
        SamplingParams(top_p=p).validate()
    except RequestValidationError:
        accepted = False
    assert accepted == (0.0 < p <= 1.0)


@pytest.mark.clause("TY-SAMPLING-4")
def test_presets() -> None:
    presets = SamplingPresets().presets
    assert list(presets) == ["greedy", "creative", "precise"]
    creative, precise = presets["creative"], presets["precise"]
    assert (creative.temperature, creative.top_p, creative.top_k, creative.repetition_penalty) == (1.2, 0.9, 50, 1.1)
    assert (precise.temperature, precise.top_p, precise.top_k, precise.repetition_penalty) == (0.3, 0.95, 20, 1.05)
    for params in presets.values():
        params.validate()
    assert SamplingPresets().presets is not presets


@pytest.mark.clause("TY-SAMPLING-5")
def test_priorities_are_ordered() -> None:
    assert [p.value for p in sorted(Priority)] == [0, 1, 2, 3]
    assert Priority.Low < Priority.Normal < Priority.High < Priority.Critical


@pytest.mark.clause("TY-SAMPLING-5")
def test_a_schema_goes_with_json_schema_only() -> None:
    assert ResponseFormat() == ResponseFormat.Text
    assert ResponseFormat.JsonSchema("{}").schema == "{}"
    for bad in (("Text", "{}"), ("JsonSchema", None), ("Yaml", None)):
        with pytest.raises(InvalidParameterError):
            ResponseFormat(*bad)  # type: ignore[arg-type]


ACCEPTED_UPSTREAM: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"presence_penalty": 99.0}, {"frequency_penalty": -99.0}, {"stop_sequences": [""]},
    {"mirostat": MirostatParams(3, -1.0, 0.0)}, {"temperature": math.inf}, {"repetition_penalty": math.inf},
    *({name: math.nan} for name in (*FLOATS, "min_p", "tfs", "typical_p")),
]  # fmt: skip


@pytest.mark.clause("TY-SAMPLING-6", "TY-PARITY-1")
@pytest.mark.parametrize("fields", ACCEPTED_UPSTREAM, ids=str)
def test_what_upstream_lets_through(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    params.validate(parity_mode=ParityMode.UPSTREAM)
    with pytest.raises(RequestValidationError):
        params.validate()


@pytest.mark.clause("TY-SAMPLING-6")
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_k": 0}, {"repetition_penalty": 0.0},
        {"min_p": 0.0}, {"tfs": 1.5}, {"typical_p": -0.2},
    ],
    ids=str,
)  # fmt: skip
def test_what_upstream_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestValidationError, match=next(iter(fields))):
        SamplingParams(**fields).validate(parity_mode=ParityMode.UPSTREAM)
    SamplingParams().validate(parity_mode=ParityMode.UPSTREAM)
