"""CTranslate2's container: what it holds, and that damaged files give named errors only."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.byte_source import MemoryBytes
from ferrum_ref.formats.ctranslate2 import CTranslate2File


def text(value: bytes) -> bytes:
    return struct.pack("<H", len(value) + 1) + value + b"\0"


def variable(name: bytes, shape: tuple[int, ...], code: int, data: bytes, num_bytes: int | None = None) -> bytes:
    head = text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return head + struct.pack("<BI", code, len(data) if num_bytes is None else num_bytes) + data


def model(*variables: bytes, aliases: bytes = b"\0\0\0\0", version: int = 6, count: int | None = None) -> bytes:
    number = len(variables) if count is None else count
    return struct.pack("<I", version) + text(b"Kind") + struct.pack("<II", 7, number) + b"".join(variables) + aliases


def opened(content: bytes) -> CTranslate2File:
    return CTranslate2File(MemoryBytes(content, "here"))


FLOATS = np.arange(6, dtype="<f4").tobytes()
GOOD = model(
    variable(b"a/weight", (2, 3), 0, FLOATS),
    variable(b"a/half", (2,), 4, np.array([1.5, -2], "<f2").tobytes()),
    variable(b"number", (), 1, b"\xfe"),
    variable(b"empty", (0, 5), 5, b""),
    variable(b"words", (2,), 2, np.array([-1, 300], "<i2").tobytes()),
    variable(b"longs", (1,), 3, np.array([-(2**31)], "<i4").tobytes()),
    aliases=struct.pack("<I", 1) + text(b"b/weight") + text(b"a/weight"),
)


@pytest.mark.clause("FM-CT2-1", "FM-CT2-3", "FM-CT2-4")
def test_what_a_file_holds() -> None:
    file = opened(GOOD)
    assert (file.kind, file.revision) == ("Kind", 7)
    assert {name: (each.element, each.shape) for name, each in file.variables.items()} == {
        "a/weight": ("F32", (2, 3)), "a/half": ("F16", (2,)), "number": ("I8", ()),
        "empty": ("BF16", (0, 5)), "words": ("I16", (2,)), "longs": ("I32", (1,)),
    }  # fmt: skip
    np.testing.assert_array_equal(file.read("a/weight"), np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(file.read("b/weight"), file.read("a/weight"))
    assert file.read("a/half").tolist() == [1.5, -2]
    assert file.read("number").tolist() == -2
    assert file.read("words").tolist() == [-1, 300]
    assert file.read("longs").tolist() == [-(2**31)]
    assert file.read("empty").shape == (0, 5)
    with pytest.raises(NotFoundError, match="no such variable"):
        file.read("c/weight")


@pytest.mark.clause("FM-CT2-1")
def test_versions() -> None:
    for version in (4, 5, 6):
        assert opened(model(version=version)).variables == {}
    for version in (0, 3, 7, 2**32 - 1):
        with pytest.raises(UnsupportedError, match=f"got {version}, expected 4 to 6"):
            opened(model(version=version))


BROKEN = {
    "nothing": (b"", InvalidFormatError, "version"),
    "cut in the kind": (GOOD[:8], InvalidFormatError, "kind"),
    "cut in the data": (GOOD[:50], InvalidFormatError, "a/weight"),
    "cut before the aliases": (GOOD[: GOOD.index(b"b/weight") - 6], InvalidFormatError, "aliases"),
    "longer": (GOOD + b"\0", InvalidFormatError, "1 bytes behind the end"),
    "too few": (model(count=3), InvalidFormatError, "name of a variable"),
    "too many": (model(count=2**16 + 1), InvalidFormatError, "at most 65536"),
    "twice": (model(*[variable(b"a", (), 1, b"\0")] * 2), InvalidFormatError, "the name twice"),
    "no name": (model(variable(b"", (), 1, b"\0")), InvalidFormatError, "name"),
    "no text": (model(variable(b"\xff", (), 1, b"\0")), InvalidFormatError, "UTF-8"),
    "a NUL inside": (model(variable(b"a\0b", (), 1, b"\0")), InvalidFormatError, "name"),
    "two NULs": (model(variable(b"a\0", (), 1, b"\0")), InvalidFormatError, "name"),
    "type": (model(variable(b"a", (), 6, b"\0")), UnsupportedError, "element type 6"),
    "bytes": (model(variable(b"a", (3,), 0, FLOATS)), InvalidFormatError, "got 24 bytes, expected the 12"),
    "lying": (model(variable(b"a", (2**20,), 0, b"", 2**22)), InvalidFormatError, "4194304 bytes of data"),
    "shape": (model(variable(b"a", (2**31,) * 3, 1, b"")), InvalidFormatError, "sizes"),
    "rank": (model(variable(b"a", (1,) * 40, 1, b"\0")), InvalidFormatError, "sizes"),
    "alias of nothing": (
        model(aliases=struct.pack("<I", 1) + text(b"b") + text(b"a")),
        InvalidFormatError,
        "alias of",
    ),
    "alias in the way": (
        model(variable(b"a", (), 1, b"\0"), aliases=struct.pack("<I", 1) + text(b"a") + text(b"a")),
        InvalidFormatError,
        "alias of",
    ),
}


@pytest.mark.clause("FM-CT2-2", "FM-CT2-4")
@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_refused(name: str) -> None:
    content, error, message = BROKEN[name]
    with pytest.raises(error, match=message) as caught:
        opened(content)
    assert "here" in str(caught.value)


@pytest.mark.clause("FM-CT2-2")
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files_give_named_errors(data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "number"]))
        if kind == "cut":
            del content[max(1, place) :]
        elif kind == "number":
            number = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1]))
            content[place : place + 4] = struct.pack("<I", number)[: len(content) - place]
        else:
            content[place] = data.draw(st.integers(0, 255)) if kind == "set" else content[place] ^ 1
    message = ""
    tracemalloc.start()
    try:
        file = opened(bytes(content))
        for name in file.variables:
            file.read(name)
    except FerrumError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**20
    assert "\n" not in message
    assert len(message) < 600
