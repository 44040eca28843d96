"""Identifiers."""

from __future__ import annotations

import dataclasses
import pickle
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.ids import BatchId, ClientId, ModelId, RequestId, SessionId, TaskId, TokenId
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.text_form import Displayed

UUID_KEYS = [RequestId, BatchId, SessionId, TaskId]


@pytest.mark.clause("TY-IDS-1")
@given(st.integers(min_value=0, max_value=2**32 - 1), st.integers(min_value=0, max_value=2**32 - 1))
def test_a_token_id_behaves_as_its_int(a: int, b: int) -> None:
    assert TokenId(a) == a
    assert hash(TokenId(a)) == hash(a)
    assert (TokenId(a) < TokenId(b)) == (a < b)
    assert str(TokenId.new(a)) == str(a)
    assert TokenId.from_value(a).get() == a
    assert {a: "x"}[TokenId(a)] == "x"


@pytest.mark.clause("TY-IDS-1")
@pytest.mark.parametrize("bad", [-1, 2**32, 2**32 + 7, 1.0, "3", None])
def test_a_token_id_out_of_range_is_refused_and_never_truncated(bad: object) -> None:
    with pytest.raises(InvalidParameterError, match="TokenId"):
        TokenId(bad)  # type: ignore[arg-type]


@pytest.mark.clause("TY-IDS-2")
@pytest.mark.parametrize("kind", UUID_KEYS)
def test_uuid_keys_print_and_parse(kind: type[RequestId]) -> None:
    text = "6fa459ea-ee8a-4ca4-894e-db77e160355e"
    key = kind.parse(text.upper())
    assert str(key) == text
    assert key == kind(uuid.UUID(text))
    assert hash(key) == hash(kind.parse(text))
    assert pickle.loads(pickle.dumps(key)) == key
    with pytest.raises(InvalidParameterError):
        kind.parse("not a uuid")
    with pytest.raises(InvalidParameterError):
        kind(text)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        key.value = uuid.UUID(text)  # type: ignore[misc]


@pytest.mark.clause("TY-IDS-2")
def test_keys_of_different_kinds_differ() -> None:
    value = uuid.UUID(int=5)
    assert len({kind(value) for kind in UUID_KEYS}) == len(UUID_KEYS)


@pytest.mark.clause("TY-IDS-3")
def test_ids_repeat_with_their_generator_and_are_fresh_without() -> None:
    first = [RequestId.new(rng) for rng in [np.random.default_rng(3)] for _ in range(4)]
    again = [RequestId.new(rng) for rng in [np.random.default_rng(3)] for _ in range(4)]
    assert first == again
    assert len(set(first)) == 4
    assert all(key.value.version == 4 for key in first)
    assert RequestId.new() != RequestId.new()


@pytest.mark.clause("TY-IDS-4")
def test_text_keys() -> None:
    assert ModelId.new("m").as_str() == str(ModelId.from_value("m")) == "m"
    assert ModelId.from_value(ModelId("m")) == ModelId("m")
    assert ModelId("m") != ClientId("m")
    assert len({ModelId("m"), ModelId("m"), ClientId("m")}) == 2


@pytest.mark.clause("TY-IDS-1", "TY-PARITY-1")
def test_upstream_cuts_a_wide_token_id_to_32_bits() -> None:
    assert TokenId.from_value(2**32 + 7, parity_mode=ParityMode.UPSTREAM) == 7
    with pytest.raises(InvalidParameterError, match="TokenId"):
        TokenId.from_value(2**32 + 7)
    for wrong in (-1, 2**64):
        with pytest.raises(InvalidParameterError, match="TokenId"):
            TokenId.from_value(wrong, parity_mode=ParityMode.UPSTREAM)


@pytest.mark.clause("TY-IDS-5")
def test_the_wrapped_value_has_upstreams_name_and_every_id_a_text() -> None:
    value = uuid.UUID(int=5, version=4)
    for kind in UUID_KEYS:
        assert (kind(value)._0, f"{kind(value)}") == (value, str(value))
        assert issubclass(kind, Displayed)
    for text in (ModelId("a b"), ClientId("a b")):
        assert (text._0, f"{text}") == ("a b", "a b")
    assert (TokenId(7)._0, f"{TokenId(7)}", repr(TokenId(7))) == (7, "7", "7")
    assert type(TokenId(7)._0) is int
