"""The committed set, what the numpy reference makes of it, and how outputs are submitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.formats.safetensors import SafetensorsFile
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import storage_named
from ferrum_ref.vectors.arrays import encode, read_tensor
from ferrum_ref.vectors.read import read_manifest
from ferrum_ref.vectors.schema import Manifest, Vector

Arrays = Mapping[str, Any]


@pytest.fixture(scope="session")
def vector_set(repository: Path) -> Path:
    return repository / "specs" / "vectors"


@pytest.fixture(scope="session")
def manifest(vector_set: Path) -> Manifest:
    return read_manifest(vector_set)


@pytest.fixture(scope="session")
def stored(vector_set: Path, manifest: Manifest) -> Arrays:
    """Every tensor of the set by its name."""
    found = {}
    for entry in manifest.operations.values():
        file = SafetensorsFile(vector_set / entry.file)
        found |= {name: read_tensor(file, name) for name in file.tensors}
        file.close()
    return found


@pytest.fixture(scope="session")
def reference(manifest: Manifest, stored: Arrays) -> Arrays:
    """The numpy reference's outputs, computed from what the files say alone, by submitted names."""
    backend = make_backend()
    return {
        vector.submitted_tensor(output.name): got
        for vector in manifest.vectors
        for output, got in zip(vector.outputs, operation_named(vector.operation).call(backend, _inputs(vector, stored)))
    }


def _inputs(vector: Vector, stored: Arrays) -> Inputs:
    arrays = {one.name: stored[vector.input_tensor(one.name)] for one in vector.inputs}
    indices = [one.name for one in vector.inputs if one.dtype == "I64"]
    settings = dict(vector.parameters) | {name: arrays.pop(name) for name in indices}
    if "softmax_scale" in settings:
        settings["params"] = AttentionParams(**vector.parameters)
    case = operation_named(vector.operation).cases[int(vector.name.rpartition(".")[2])]
    return Inputs(case, storage_named(vector.storage), arrays, settings)


@pytest.fixture
def submit(tmp_path: Path) -> Callable[[Arrays], Path]:
    """Writes outputs by name to a file and gives its path."""

    def write(outputs: Arrays) -> Path:
        path = tmp_path / "outputs.safetensors"
        path.write_bytes(encode({name: np.asarray(array) for name, array in outputs.items()}))
        return path

    return write
