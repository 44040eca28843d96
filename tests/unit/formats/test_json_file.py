"""JSON of model directories: broken text becomes one line with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.json_file import read_json_object


@pytest.mark.clause("MD-JSON-1")
def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"a": [1, null, "ü"]}', "utf-8")
    assert read_json_object(path) == {"a": [1, None, "ü"]}


@pytest.mark.clause("MD-JSON-1")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 column 1"),
        (b'{\n "a": 1,\n}', "line 3 column 1"),
        (b'{"a": "\xff"}', "byte 7"),
        (b"[1, 2]", "got a list, expected a JSON object"),
        (b'{"a": {"b": 1, "b": 2}}', "got the name 'b' twice"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "expected plain JSON"),
        (b"[" * 200_000, "expected plain JSON"),
    ],
    ids=["empty", "comma", "utf-8", "list", "twice", "digits", "nesting"],
)
def test_broken_text_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(InvalidFormatError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("MD-JSON-1")
def test_size_and_absence(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_json_object(tmp_path / "absent.json")
    with pytest.raises(FerrumIOError):
        read_json_object(tmp_path)
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(InvalidFormatError, match="expected at most 67108864"):
        read_json_object(path)
