"""The manifest of a set of golden vectors: what `manifest.json` says.

    DIR/manifest.json                 this file's records
    DIR/<operation>.safetensors       inputs, float64 values and bounds of that operation's vectors

Clauses: GV-FORMAT-1, GV-FORMAT-3 (specs/vectors.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

FORMAT: Final = "ferrum-golden-vectors"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
SUFFIX: Final = ".safetensors"


@dataclass(frozen=True, slots=True)
class Input:
    """An array that goes in; `dtype` is safetensors' name of its element type."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """An array that must come out: element type `dtype`, its axes by name.

    exact: the value is stored in that type and every bit counts; else it is stored in float64, beside its bounds.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class Vector:
    """One call of one operation. `flags` say why it exists, `clauses` which promises of specs/ it shows."""

    name: str
    operation: str
    storage: str
    flags: tuple[str, ...]
    clauses: tuple[str, ...]
    parameters: Mapping[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    origin: str

    def input_tensor(self, name: str) -> str:
        """The name, in the operation's file, of the input `name`. Pure.  [GV-FORMAT-3]"""
        return f"{self.name}/in/{name}"

    def value_tensor(self, name: str) -> str:
        """Of the value of the output `name`. Pure."""
        return f"{self.name}/value/{name}"

    def bound_tensor(self, name: str) -> str:
        """Of the bounds of the output `name`, where it is not exact. Pure."""
        return f"{self.name}/bound/{name}"

    def submitted_tensor(self, name: str) -> str:
        """The name under which the output `name` is submitted. Pure.  [GV-CHECK-1]"""
        return f"{self.name}/{name}"


@dataclass(frozen=True, slots=True)
class OperationEntry:
    """What an operation means in one line, and the file that holds its vectors' arrays, with its SHA-256."""

    meaning: str
    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A set: the arithmetic that the bounds are derived for, the operations and the vectors in order."""

    algorithm: Mapping[str, Any]
    operations: Mapping[str, OperationEntry]
    vectors: tuple[Vector, ...]

    def as_json(self) -> dict[str, Any]:
        """The document that `read_manifest` reads back. Pure.  [GV-FORMAT-1]"""
        rest = asdict(self) | {"operations": {name: asdict(entry) for name, entry in self.operations.items()}}
        return {"format": FORMAT, "version": VERSION, **rest}

    def as_text(self) -> str:
        """The same as the text of the file, a line for each operation and each vector. Pure.  [GV-FORMAT-1]"""
        document = self.as_json()
        vectors, operations = document.pop("vectors"), document.pop("operations")
        head = "".join(f" {json.dumps(key)}: {_line(value)},\n" for key, value in document.items())
        named = ",\n".join(f"  {json.dumps(key)}: {_line(value)}" for key, value in operations.items())
        listed = ",\n".join(f"  {_line(value)}" for value in vectors)
        return f'{{\n{head} "operations": {{\n{named}\n }},\n "vectors": [\n{listed}\n ]\n}}\n'


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
