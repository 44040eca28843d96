"""From a name on the command line to what is judged.  Clauses: PA-OPEN-1..3 (specs/judging.md)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ferrum_ref.errors import BackendError, FerrumError, InvalidParameterError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.decode import MakeDecode
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.subject import ArrayFunction, BackendSubject, FunctionSubject, Subject
from ferrum_ref.parity.units import Array
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.algorithm import Algorithm

Plain = Callable[..., Any]


def open_subject(name: str, device: str = "cpu", decode: MakeDecode | None = None) -> Subject:
    """A registered backend, or what "package.module:attribute" is or makes.  [PA-OPEN-1]

    The attribute may be a mapping from operation names to functions, a Subject, or a factory of one of these or of a
    ComputeBackend, called with the device. `decode` builds decode backends where a backend has none of its own.
    Raises what `load_backend` raises; InvalidParameterError for an operation that does not exist.
    """
    if ":" not in name:
        return BackendSubject(load_backend(name, device), name, device, decode)
    module_name, _, attribute = name.partition(":")
    found = _attribute(name, module_name, attribute)
    if callable(found) and not isinstance(found, (Mapping, Subject, ComputeBackend)):
        try:
            found = found(device)
        except FerrumError:
            raise
        except ImportError as error:
            raise UnsupportedError(f"parity: {name} is unavailable: {error}; install what it needs") from error
        except Exception as error:
            raise BackendError(f"parity: {name}: the factory failed with {type(error).__name__}: {error}") from error
    if isinstance(found, ComputeBackend):
        return BackendSubject(found, name, device, decode)
    if isinstance(found, Subject):
        return found
    if isinstance(found, Mapping):
        return adapted(name, found)
    raise BackendError(
        f"parity: {name} is {type(found).__name__}, expected a ComputeBackend, a Subject, "
        "or functions by operation name"
    )


def adapted(
    name: str, functions: Mapping[str, Plain], algorithms: Mapping[str, Algorithm] | None = None
) -> FunctionSubject:
    """Plain functions as what is judged: each gets the operation's arrays and settings by name.  [PA-OPEN-2]

        def rms_norm(x, weight, eps): ...            # numpy arrays in, an array (or a tuple of them) out
        functions = {"rms_norm": rms_norm}

    A function may carry its declared arithmetic as an attribute `algorithm`. Raises InvalidParameterError for an
    operation that does not exist, or what is no function.
    """
    declared = dict(algorithms or {})
    for operation, function in functions.items():
        operation_named(operation)
        if not callable(function):
            raise InvalidParameterError(
                f"parity: {name}: {operation} is {type(function).__name__}, expected a function"
            )
        if isinstance(getattr(function, "algorithm", None), Algorithm):
            declared.setdefault(operation, function.algorithm)  # type: ignore[attr-defined]
    return FunctionSubject(name, {one: _by_name(function) for one, function in functions.items()}, declared)


def _by_name(function: Plain) -> ArrayFunction:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        outputs = function(**inputs.arrays, **inputs.settings)
        return tuple(np.asarray(one) for one in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return run


def _attribute(name: str, module_name: str, attribute: str) -> Any:
    """Raises InvalidParameterError (no such spelling), NotFoundError (module or attribute), UnsupportedError."""
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise InvalidParameterError(f"parity: backend: got {name!r}, expected a name or 'package.module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise NotFoundError(f"parity: {name}: there is no module {error.name!r} on the Python path") from error
        raise UnsupportedError(f"parity: {name} is unavailable: {error}; install what it needs") from error
    except ImportError as error:
        raise UnsupportedError(f"parity: {name} is unavailable: {error}; install what it needs") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise NotFoundError(f"parity: {name}: {module_name} has no {part!r}")
        found = getattr(found, part)
    return found
