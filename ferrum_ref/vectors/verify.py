"""The verdict on a submitted file of outputs.   Clauses: GV-CHECK-1..6, GV-FORMAT-3.

Output y of vector V is the tensor "V/y" of the file, in the element type and shape that the manifest gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError
from ferrum_ref.formats.elements import ELEMENTS, Array
from ferrum_ref.formats.safetensors import SafetensorsFile
from ferrum_ref.parity.ops.operation import Expected
from ferrum_ref.parity.units import storage_named
from ferrum_ref.parity.verdict import Verdict, judge
from ferrum_ref.vectors.arrays import open_checked, read_tensor
from ferrum_ref.vectors.read import read_manifest
from ferrum_ref.vectors.schema import Manifest, Output, Vector

PASS, FAIL, MISSING = "pass", "fail", "missing"
WRONG_SHAPE, WRONG_DTYPE, NAN = "wrong shape", "wrong dtype", "NaN"
STATUSES: Final = (PASS, FAIL, NAN, MISSING, WRONG_SHAPE, WRONG_DTYPE)


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output of one vector. ratio: largest err / bound, inf where nothing finite can be said."""

    name: str
    status: str
    ratio: float
    message: str


@dataclass(frozen=True, slots=True)
class VectorResult:
    """One vector: the status and the ratio of its worst output."""

    vector: Vector
    outputs: tuple[OutputResult, ...]

    @property
    def worst(self) -> OutputResult:
        return max(self.outputs, key=lambda one: (one.status != PASS, one.ratio))


@dataclass(frozen=True, slots=True)
class Check:
    """Every vector in order, and the tensors of the file that no vector of the set asks for."""

    results: tuple[VectorResult, ...]
    unexpected: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(result.worst.status == PASS for result in self.results)


def check_outputs(directory: Path, outputs: Path, operations: Sequence[str] = (), dtypes: Sequence[str] = ()) -> Check:
    """Judge the file `outputs` by the set in `directory`; no operation or element type named means all.  [GV-CHECK-1]

    Raises NotFoundError, FerrumIOError, InvalidFormatError, UnsupportedError (a set or a file that cannot be read),
    InvalidParameterError (a name that the set does not have).
    """
    manifest = read_manifest(directory)
    vectors = select(manifest, operations, dtypes)
    submitted = SafetensorsFile(outputs)
    try:
        results = tuple(_results(manifest, directory, vectors, submitted))
        known = {vector.submitted_tensor(output.name) for vector in manifest.vectors for output in vector.outputs}
        return Check(results, tuple(sorted(submitted.tensors.keys() - known)))
    finally:
        submitted.close()


def select(manifest: Manifest, operations: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Vector]:
    """The vectors of these operations in these element types, in order. Pure.

    Raises InvalidParameterError for an unknown name, and where nothing is left.
    """
    for name in operations:
        if name not in manifest.operations:
            known = ", ".join(manifest.operations)
            raise InvalidParameterError(f"vectors: operation {name!r}: got no such name, expected one of {known}")
    wanted = [storage_named(name).name for name in dtypes]
    found = [
        vector
        for vector in manifest.vectors
        if (not operations or vector.operation in operations) and (not wanted or vector.storage in wanted)
    ]
    if not found:
        raise InvalidParameterError("vectors: the set has none of this operation in this element type; name fewer")
    return found


def expected_of(file: SafetensorsFile, vector: Vector, output: Output) -> Expected:
    """What the judge compares an output with: the stored value and bound.  [GV-FORMAT-3]

    Raises NotFoundError (a tensor is absent), InvalidFormatError (it is not what the manifest says).
    """
    value = _described(file, vector.value_tensor(output.name), output, output.dtype if output.exact else "F64")
    bound = None if output.exact else _described(file, vector.bound_tensor(output.name), output, "F64")
    return Expected(output.name, value, output.axes, ELEMENTS[output.dtype], bound)


def _described(file: SafetensorsFile, name: str, output: Output, dtype: str) -> Array:
    array, row = read_tensor(file, name), file.tensors[name]
    if row.dtype != dtype or row.shape != output.shape:
        expected = f"{dtype} {list(output.shape)}, as the manifest says"
        raise InvalidFormatError(
            f"read safetensors {file.path}: {name}: got {row.dtype} {list(row.shape)}, expected {expected}"
        )
    return array


def _results(
    manifest: Manifest, directory: Path, vectors: Sequence[Vector], submitted: SafetensorsFile
) -> Iterator[VectorResult]:
    files: dict[str, SafetensorsFile] = {}
    try:
        for vector in vectors:
            entry = manifest.operations[vector.operation]
            if entry.file not in files:
                files[entry.file] = open_checked(directory / entry.file, entry.num_bytes, entry.sha256)
            file = files[entry.file]
            yield VectorResult(vector, tuple(_output_result(file, submitted, vector, one) for one in vector.outputs))
    finally:
        for file in files.values():
            file.close()


def _output_result(file: SafetensorsFile, submitted: SafetensorsFile, vector: Vector, output: Output) -> OutputResult:
    """[GV-CHECK-2..5]"""
    name = vector.submitted_tensor(output.name)
    row = submitted.tensors.get(name)
    if row is None:
        return OutputResult(output.name, MISSING, math.inf, f"the file has no tensor {name!r}")
    if row.shape != output.shape:
        message = f"{output.name}: shape {list(row.shape)}, expected {list(output.shape)}"
        return OutputResult(output.name, WRONG_SHAPE, math.inf, message)
    if row.dtype != output.dtype:
        message = f"{output.name}: element type {row.dtype}, expected {output.dtype}: store the result as that"
        return OutputResult(output.name, WRONG_DTYPE, math.inf, message)
    verdict = judge(expected_of(file, vector, output), read_tensor(submitted, name))
    if verdict.passed:
        return OutputResult(output.name, PASS, verdict.ratio_det, "")
    unasked = math.isnan(verdict.got) and not math.isnan(verdict.expected)
    return OutputResult(output.name, NAN if unasked else FAIL, verdict.ratio_det, _told(output, verdict))


def _told(output: Output, verdict: Verdict) -> str:
    """The worst element, the reason and the extent in one line."""
    place = ", ".join(f"{axis} {position}" for axis, position in verdict.coordinates)
    bounds = "exact" if output.exact else f"bound {verdict.bound:.3g}"
    ratio = "" if output.exact else f": err/bound {verdict.ratio_det:.3g}"
    where = f"{output.name}[{place}]" if place else output.name
    told = f"{where}: got {verdict.got:.9g}, expected {verdict.expected:.9g}, {bounds}{ratio}"
    return f"{told}; {verdict.extent}" if verdict.extent else told
