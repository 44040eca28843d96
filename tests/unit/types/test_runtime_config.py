"""Where settings come from, and the element types of a cache."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import ConfigError, InvalidParameterError
from ferrum_ref.interfaces import kv_dtype
from ferrum_ref.serialization import from_json, to_json
from ferrum_ref.types.runtime_config import (
    KvCacheDtype,
    RuntimeConfigEffect,
    RuntimeConfigEntry,
    RuntimeConfigSnapshot,
    RuntimeConfigSource,
    RuntimeKnobs,
    parse_bool,
    parse_tri_state,
)


@pytest.mark.clause("TY-RUNTIME-1")
def test_element_types_of_a_cache() -> None:
    kinds = [kv_dtype.KvFp16, kv_dtype.KvBf16, kv_dtype.KvInt8, kv_dtype.KvFp8]
    assert [(k.NAME, k.BYTES_PER_ELEM) for k in kinds] == [("fp16", 2), ("bf16", 2), ("int8", 1), ("fp8", 1)]
    assert all(issubclass(k, kv_dtype.KvDtypeKind) for k in kinds)
    assert [item.value.lower() for item in KvCacheDtype] == [k.NAME for k in kinds]


@pytest.mark.clause("TY-RUNTIME-1")
def test_no_knob_is_set_at_first() -> None:
    knobs = RuntimeKnobs()
    assert {getattr(knobs, name) for name in RuntimeKnobs.__dataclass_fields__} == {None, False}
    with pytest.raises(InvalidParameterError, match="kv_capacity"):
        RuntimeKnobs(kv_capacity=-1)


@pytest.mark.clause("TY-RUNTIME-2")
@given(st.dictionaries(st.sampled_from(["FERRUM_B", "FERRUM_A", "HOME", "FERRUM_", "ferrum_c"]), st.text()))
def test_a_snapshot_is_sorted_and_holds_ferrums_variables_only(environment: dict[str, str]) -> None:
    entries = RuntimeConfigSnapshot.capture(environment).entries
    assert [entry.key for entry in entries] == sorted(key for key in environment if key.startswith("FERRUM_"))
    assert all(entry.effective_value == environment[entry.key] for entry in entries)
    assert all(entry.source is RuntimeConfigSource.Env for entry in entries)


@pytest.mark.clause("TY-RUNTIME-2")
def test_an_entry_replaces_the_one_of_its_key() -> None:
    first = RuntimeConfigSnapshot.capture({"FERRUM_B": "1", "FERRUM_A": "2"})
    mine = RuntimeConfigEntry("FERRUM_B", "3", RuntimeConfigSource.Cli, [RuntimeConfigEffect.Memory])
    for changed in (first.upsert(mine), first.with_entry(mine)):
        assert [(e.key, e.effective_value) for e in changed.entries] == [("FERRUM_A", "2"), ("FERRUM_B", "3")]
    assert first.entries[1].effective_value == "1"
    assert from_json(RuntimeConfigSnapshot, to_json(first)) == first


@pytest.mark.clause("TY-RUNTIME-3")
def test_words_for_true_and_false() -> None:
    for word in ("1", "true", "yes", "on", " TRUE ", "On"):
        assert parse_bool("K", word) is parse_tri_state("K", word) is True
    for word in ("0", "false", "no", "off", "False\n"):
        assert parse_bool("K", word) is parse_tri_state("K", word) is False
    for unset in (None, "", "  "):
        assert parse_tri_state("K", unset) is None
    for wrong in ("2", "maybe", "tru"):
        for parse in (parse_bool, parse_tri_state):
            with pytest.raises(ConfigError, match=f"K: got '{wrong}'"):
                parse("K", wrong)
    with pytest.raises(ConfigError):
        parse_bool("K", "")
