"""Reads a manifest without trusting it.   Clauses: GV-FORMAT-1..2 (specs/vectors.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.formats.elements import ELEMENTS
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.vectors.schema import FORMAT, MANIFEST, SUFFIX, VERSION, Input, Manifest, OperationEntry, Output, Vector

Kind = TypeVar("Kind")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the set in `directory`, every field checked.  [GV-FORMAT-1..2]

    Raises NotFoundError (no such file), FerrumIOError, InvalidFormatError (not a manifest), UnsupportedError (another
    version).
    """
    path = directory / MANIFEST
    row = _Row(read_json_object(path), str(path), "")
    if row.fields.get("format") != FORMAT:
        row.fail("format", row.fields.get("format"), f"{FORMAT!r}: this is no manifest of golden vectors")
    version = row.take("version", int)
    if version != VERSION:
        raise UnsupportedError(
            f"read {path}: version: got {version}, expected {VERSION}; read it with the release that wrote it"
        )
    operations = {name: _operation(entry) for name, entry in row.children("operations", row.take("operations", dict))}
    listed = row.children("vectors", dict(enumerate(row.take("vectors", list))))
    vectors = tuple(_vector(entry, operations) for _, entry in listed)
    names = [vector.name for vector in vectors]
    if len(set(names)) != len(names):
        row.fail("vectors", next(name for name in names if names.count(name) > 1), "every name once")
    return Manifest(row.take("algorithm", dict), operations, vectors)


@dataclass(frozen=True, slots=True)
class _Row:
    """An object of the document, and where it stands."""

    fields: dict[str, Any]
    source: str
    place: str

    def take(self, name: str, kind: type[Kind]) -> Kind:
        value = self.fields.get(name)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        return self.fail(name, value, f"a JSON value of type {kind.__name__}")  # type: ignore[no-any-return]

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.take(name, list)
        if not all(isinstance(value, str) for value in values):
            self.fail(name, values, "a list of texts")
        return tuple(values)

    def shape(self) -> tuple[int, ...]:
        sizes = self.take("shape", list)
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
            self.fail("shape", sizes, "a list of sizes")
        return tuple(sizes)

    def dtype(self) -> str:
        name = self.take("dtype", str)
        return name if name in ELEMENTS else self.fail("dtype", name, f"one of {', '.join(ELEMENTS)}")

    def children(self, name: str, values: Mapping[Any, Any]) -> list[tuple[Any, _Row]]:
        found = []
        for key, value in values.items():
            if not isinstance(value, dict):
                self.fail(f"{name}[{key}]", value, "an object")
            found.append((key, _Row(value, self.source, f"{self.place}{name}[{key}].")))
        return found

    def fail(self, name: str, got: object, expected: str) -> Any:
        raise InvalidFormatError(f"read {self.source}: {self.place}{name}: got {got!r:.80}, expected {expected}")


def _operation(row: _Row) -> OperationEntry:
    file = row.take("file", str)
    if PurePosixPath(file).name != file or "\\" in file or not file.endswith(SUFFIX):
        row.fail("file", file, f"the name of a {SUFFIX} file beside the manifest")
    return OperationEntry(row.take("meaning", str), file, row.take("num_bytes", int), row.take("sha256", str))


def _vector(row: _Row, operations: Mapping[str, OperationEntry]) -> Vector:
    operation = row.take("operation", str)
    if operation not in operations:
        row.fail("operation", operation, "one that the manifest's operations list")
    inputs = row.children("inputs", dict(enumerate(row.take("inputs", list))))
    outputs = row.children("outputs", dict(enumerate(row.take("outputs", list))))
    if not outputs:
        row.fail("outputs", [], "at least one")
    return Vector(
        name=row.take("name", str),
        operation=operation,
        storage=row.take("storage", str),
        flags=row.texts("flags"),
        clauses=row.texts("clauses"),
        parameters=row.take("parameters", dict),
        inputs=tuple(Input(i.take("name", str), i.dtype(), i.shape()) for _, i in inputs),
        outputs=tuple(_output(entry) for _, entry in outputs),
        origin=row.take("origin", str),
    )


def _output(row: _Row) -> Output:
    axes, shape = row.texts("axes"), row.shape()
    if len(axes) != len(shape):
        row.fail("axes", list(axes), f"a name for each of {len(shape)} axes")
    return Output(row.take("name", str), row.dtype(), shape, axes, row.take("exact", bool))
