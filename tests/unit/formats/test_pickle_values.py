"""Pickles as data: plain values come out as pickle.loads gives them, code never runs, lies cost nothing."""

from __future__ import annotations

import os
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumError, InvalidFormatError, UnsupportedError
from ferrum_ref.formats.pickle_values import Global, PickleReader


def reader(data: bytes, known: tuple[str, ...] = ()) -> PickleReader:
    return PickleReader(
        data,
        "x.pkl",
        knows=lambda found: found.name in known,
        reduce=lambda function, arguments: (function.name, arguments),
        persistent_load=lambda identity: ("persistent", identity),
    )


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@pytest.mark.clause("WL-PICKLE-1")
@given(VALUES, st.sampled_from([2, 3, 4, 5]))
def test_plain_values(value: Any, protocol: int) -> None:
    if protocol == 2 and any(name in pickle.dumps(value, 2) for name in (b"_codecs", b"__builtin__")):
        return  # bytes take a call at protocol 2
    assert reader(pickle.dumps(value, protocol)).load() == value


@pytest.mark.clause("WL-PICKLE-1")
def test_one_behind_the_other() -> None:
    found = reader(pickle.dumps([1], 2) + pickle.dumps("b", 4) + b"rest")
    assert (found.load(), found.load(), found._data[found.offset :]) == ([1], "b", b"rest")


class Evil:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts[0], self.parts[1:]


@pytest.mark.clause("WL-PICKLE-2")
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_is_refused_by_name(protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for evil in (
        Evil(os.system, f"touch {canary}"),
        Evil(exec, f"open({str(canary)!r}, 'w')"),
        Evil(Path.touch, canary),
    ):
        with pytest.raises(UnsupportedError, match="nothing in the file was executed"):
            reader(pickle.dumps({"w": evil}, protocol)).load()
    assert not canary.exists()
    with pytest.raises(UnsupportedError, match=r"global: got posix\.system"):
        reader(pickle.dumps(Evil(os.system, "true"), 2)).load()


@pytest.mark.clause("WL-PICKLE-2")
def test_no_module_is_imported() -> None:
    assert "antigravity" not in sys.modules
    with pytest.raises(UnsupportedError, match=r"antigravity\.fly"):
        reader(b"cantigravity\nfly\n.").load()
    assert reader(b"cantigravity\nfly\n.", ("fly",)).load() == Global("antigravity", "fly")
    assert reader(b"cantigravity\nfly\n(K\x01tR.", ("fly",)).load() == ("fly", (1,))
    assert reader(b"\x8c\x01m\x8c\x01f\x93.", ("f",)).load() == Global("m", "f")
    assert "antigravity" not in sys.modules


LIES = {
    "bytearray": b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.",
    "bytes": b"B\xff\xff\xff\x7f.",
    "bytes8": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "text8": b"\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "long4": b"\x8b\xff\xff\xff\x7f.",
    "memo": b"Nr\xff\xff\xff\xff0j\xfe\xff\xff\xff.",
    "get": b"h\x05.",
    "empty": b"",
    "no stop": b"]",
    "stop at once": b".",
    "two values": b"]].",
    "mark left": b"(].",
    "mark alone": b"(.",
    "pop": b"0.",
    "tuple of nothing": b"\x87.",
    "no mark": b"]e.",
    "append to a number": b"K\x01K\x02a.",
    "odd pairs": b"}(K\x01u.",
    "list as key": b"}(]K\x01u.",
    "call of a number": b"K\x01)R.",
    "state of a list": b"]}b.",
    "object": b"(i__main__\nC\n.",
    "text opcode": b"I5\n.",
    "extension": b"\x82\x01.",
    "new object": b"\x81.",
    "global without end": b"cabc",
    "utf-8": b"X\x01\x00\x00\x00\xff.",
    "stack global": b"K\x01K\x02\x93.",
}


@pytest.mark.clause("WL-PICKLE-3")
@pytest.mark.parametrize("name", LIES)
def test_lies(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((InvalidFormatError, UnsupportedError)) as caught:
            reader(LIES[name]).load()
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.clause("WL-PICKLE-3")
def test_a_large_memo_index_is_no_allocation() -> None:
    assert reader(b"K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.").load() == 7


@pytest.mark.clause("WL-PICKLE-4")
def test_deep_nesting() -> None:
    depth = 100_000
    value = reader(b"]" * (depth + 1) + b"a" * depth + b".").load()
    for _ in range(depth):
        (value,) = value
    assert value == []
    value = reader(b")" + b"\x85" * depth + b".").load()
    assert isinstance(value, tuple)
    with pytest.raises(FerrumError):  # such a tuple as a key would overflow the stack of the hash function
        reader(b"})" + b"\x85" * depth + b"K\x01s.").load()
