"""Makes a set of golden vectors from the judge's cases.   Clauses: GV-SET-1..3, GV-BOUND-1..3, GV-WRITE-1..3."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ferrum_ref.errors import FerrumIOError, InternalError, InvalidParameterError
from ferrum_ref.formats.elements import Array
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.operation import IID, Expected, Inputs, Operation
from ferrum_ref.parity.runner import draw_case
from ferrum_ref.parity.units import storage_named
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.vectors.arrays import ELEMENT_NAMES, element_name, encode, write_file
from ferrum_ref.vectors.catalogue import GROUPS
from ferrum_ref.vectors.schema import MANIFEST, SUFFIX, Input, Manifest, OperationEntry, Output, Vector
from ferrum_ref.vectors.selection import SEED, Group, Pick, chosen

Progress = Callable[[int, int, str], None]
RANDOM: Final = "random"  # what the judge calls iid
PACKED: Final = "quantized_linear_"


@dataclass(frozen=True, slots=True)
class Built:
    """A vector and its arrays by their names in the file."""

    vector: Vector
    arrays: Mapping[str, Array]


def write_vectors(
    directory: Path,
    operations: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    on_progress: Progress = lambda done, total, name: None,
    groups: Sequence[Group] = GROUPS,
) -> Manifest:
    """Write the chosen vectors to `directory`, made if need be: data first, the manifest last.  [GV-WRITE-1..3]

    The same arguments give the same bytes. Raises InvalidParameterError (unknown name, nothing chosen), FerrumIOError.
    """
    picks = list(chosen(groups, operations, dtypes))
    if not picks:
        raise InvalidParameterError("vectors: no vector has this operation in this element type; leave one of them out")
    built = []
    for done, (group, pick, storage) in enumerate(picks):
        on_progress(done, len(picks), f"{group.operation} {storage}")
        built.append(build(group, pick, storage))
    on_progress(len(picks), len(picks), "")
    meanings = {group.operation: group.meaning for group, _, _ in picks}
    files = {name: encode(_arrays_of(built, name)) for name in meanings}
    entries = {
        name: OperationEntry(meanings[name], f"{name}{SUFFIX}", len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }
    manifest = Manifest(asdict(Algorithm()), entries, tuple(one.vector for one in built))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FerrumIOError(f"write vectors to {directory}: {error.strerror or error}") from error
    for name, data in files.items():
        write_file(directory / entries[name].file, data)
    write_file(directory / MANIFEST, manifest.as_text().encode())
    return manifest


def build(group: Group, pick: Pick, storage_name: str) -> Built:
    """The vector of one pick: the judge's inputs, float64 values and det bounds of the default algorithm. Pure."""
    operation = operation_named(group.operation)
    inputs = draw_case(operation, storage_named(storage_name), pick.index, SEED)
    with np.errstate(all="ignore"):
        expected = operation.expect(inputs, Algorithm())
    name = f"{group.operation}.{storage_name}.{pick.index}"
    given = {**inputs.arrays, **{key: value.astype(np.int64) for key, value in _index_arrays(inputs).items()}}
    probe = RANDOM if inputs.case.probe == IID else inputs.case.probe
    vector = Vector(
        name=name,
        operation=group.operation,
        storage=storage_name,
        flags=(probe, *pick.flags),
        clauses=(*group.clauses, *pick.clauses),
        parameters=_parameters(operation, inputs),
        inputs=tuple(Input(key, element_name(value), value.shape) for key, value in given.items()),
        outputs=tuple(
            Output(one.name, ELEMENT_NAMES[one.dtype], one.value.shape, one.axes, one.det is None) for one in expected
        ),
        origin=f"ferrum-ref parity --op {group.operation} --dtype {storage_name} --case {pick.index} --seed {SEED}",
    )
    arrays = {vector.input_tensor(key): value for key, value in given.items()}
    for one in expected:
        arrays |= _results(vector, one)
    return Built(vector, arrays)


def _index_arrays(inputs: Inputs) -> dict[str, Array]:
    return {key: value for key, value in inputs.settings.items() if isinstance(value, np.ndarray)}


def _parameters(operation: Operation, inputs: Inputs) -> dict[str, Any]:
    """What is no array: eps, axis, the fields of AttentionParams, the packed format."""
    found: dict[str, Any] = {}
    for key, value in inputs.settings.items():
        if isinstance(value, AttentionParams):
            found |= asdict(value)
        elif not isinstance(value, np.ndarray):
            found[key] = value
    if "axis" in inputs.case.sizes:
        found["axis"] = inputs.case.sizes["axis"]
    if operation.name.startswith(PACKED):
        found["format"] = operation.name.removeprefix(PACKED).upper()
    return found


def _results(vector: Vector, one: Expected) -> dict[str, Array]:
    """The tensors of an output: its exact bits, or float64 values with bounds (0 where the value is not finite).

    Raises InternalError where a bound is no finite number, or a value within it may round to infinity: the plain rule
    |got - value| <= bound would not do.  [GV-BOUND-2]
    """
    if one.choice is not None:
        raise InternalError(f"vectors: {vector.name}: {one.name} admits several indices; choose another case")
    if one.det is None:
        return {vector.value_tensor(one.name): one.value}
    finite = np.isfinite(one.value)
    bound = np.where(finite, one.det, 0.0)
    room = np.inf if one.storage is None else one.storage.largest
    if not np.all(np.isfinite(bound)) or np.any(np.abs(np.where(finite, one.value, 0.0)) + bound > room):
        raise InternalError(f"vectors: {vector.name}: {one.name} may leave the range of its type; choose another case")
    value = np.where(np.isnan(one.value), np.nan, one.value)  # one NaN, whatever its bits were
    return {vector.value_tensor(one.name): value, vector.bound_tensor(one.name): bound}


def _arrays_of(built: Sequence[Built], operation: str) -> dict[str, Array]:
    return {key: array for one in built if one.vector.operation == operation for key, array in one.arrays.items()}
