"""Finds compute backends by name, and says why one cannot be used.

A backend is a factory `make_backend(device: str = "cpu") -> ComputeBackend`, found in one of two ways: an installed
distribution names it in the entry point group `ferrum_ref.backends`, or the caller spells it out as
"package.module:factory". Names are read from installed metadata; a backend's code is imported when that backend is
loaded or its availability is asked for, never before. Nothing is remembered between calls.

Clauses: BK-PLUGIN-1..7 (specs/plugins.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    FerrumError,
    InvalidParameterError,
    NotFoundError,
    UnsupportedError,
)
from ferrum_ref.interfaces.backend import ComputeBackend

ENTRY_POINT_GROUP = "ferrum_ref.backends"


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What is known about one backend.  [BK-PLUGIN-4]

    target is "package.module:factory"; reason is why it is unavailable, "" when it is available; version and devices
    are what the backend itself reports, "" and () when it is unavailable.
    """

    name: str
    target: str
    available: bool
    reason: str
    version: str
    devices: tuple[str, ...]


def backend_targets(points: Iterable[EntryPoint] | None = None) -> dict[str, tuple[str, ...]]:
    """Registered names in alphabetical order, each with its "package.module:factory"; imports nothing.  [BK-PLUGIN-1]

    A name that two distributions point at different factories keeps both. points (for tests) stands in for the
    installed metadata. Pure.
    """
    found: dict[str, set[str]] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP) if points is None else points:
        found.setdefault(point.name, set()).add(point.value)
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def available_backends(points: Iterable[EntryPoint] | None = None) -> dict[str, BackendInfo]:
    """Every registered backend, tried on its default device; one that fails has its reason.  [BK-PLUGIN-4..5]

    Imports each backend's code. Pure otherwise; raises nothing for a backend's failure.
    """
    targets = backend_targets(points)
    return {name: _describe(name, targets) for name in targets}


def load_backend(name: str, device: str = "cpu", *, points: Iterable[EntryPoint] | None = None) -> ComputeBackend:
    """The backend registered as `name`, or made by "package.module:factory", on `device`.  [BK-PLUGIN-2..3, 6..7]

    Raises NotFoundError for an unknown name (the known ones are listed), module or factory; InvalidParameterError for a
    target that is not "package.module:factory"; AlreadyExistsError for a name with two factories; UnsupportedError,
    with the remedy, when something it needs is not installed; BackendError when the factory fails or returns something
    else than a ComputeBackend.
    """
    return _make(name, name if ":" in name else _target_of(name, backend_targets(points)), device)


def _target_of(name: str, targets: Mapping[str, tuple[str, ...]]) -> str:
    if name not in targets:
        known = ", ".join(targets) or "none"
        raise NotFoundError(
            f"load_backend: name: got {name!r}, expected one of: {known}; or give a factory as 'package.module:factory'"
        )
    if len(targets[name]) > 1:
        raise AlreadyExistsError(
            f"load_backend: name: {name!r} is registered by several packages ({', '.join(targets[name])}), "
            "expected one; uninstall all but one, or give the factory as 'package.module:factory'"
        )
    return targets[name][0]


def _make(name: str, target: str, device: str | None) -> ComputeBackend:
    """Imports the target, calls it (on its default device for None) and checks what comes back."""
    module_name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise InvalidParameterError(f"load_backend: name: got {target!r}, expected 'package.module:factory'")
    try:
        factory = _resolve(name, module_name, attribute)
        made = factory() if device is None else factory(device)
    except FerrumError:
        raise
    except ImportError as error:
        missing = f" ({error.name} is missing)" if error.name else ""
        raise UnsupportedError(
            f"load_backend: backend {name!r} ({target}) is unavailable{missing}: {error}; "
            "install what it needs and try again"
        ) from error
    except Exception as error:
        raise BackendError(
            f"load_backend: backend {name!r} ({target}): the factory failed on device {device!r} with "
            f"{type(error).__name__}: {error}; report this to the backend's author"
        ) from error
    if not isinstance(made, ComputeBackend):
        raise BackendError(
            f"load_backend: backend {name!r} ({target}): the factory returned {type(made).__name__}, "
            "expected a ComputeBackend"
        )
    return made


def _resolve(name: str, module_name: str, attribute: str):  # type: ignore[no-untyped-def]  # whatever the name stands for
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module itself (or a package above it) is absent; an absent dependency of it is the caller's ImportError.
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise NotFoundError(
                f"load_backend: backend {name!r}: got module {module_name!r}, expected an importable module; "
                "install the package that provides it or correct the name"
            ) from error
        raise
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise NotFoundError(
                f"load_backend: backend {name!r}: got factory {attribute!r}, expected a callable in {module_name!r}; "
                "correct the name"
            )
        found = getattr(found, part)
    if not callable(found):
        raise BackendError(
            f"load_backend: backend {name!r}: {module_name}:{attribute} is {type(found).__name__}, expected a callable "
            "make_backend(device='cpu')"
        )
    return found


def _describe(name: str, targets: Mapping[str, tuple[str, ...]]) -> BackendInfo:
    target = " | ".join(targets[name])
    try:
        backend = _make(name, _target_of(name, targets), None)
        devices = tuple(str(device) for device in backend.capabilities().supported_devices)
        return BackendInfo(name, target, True, "", backend.version(), devices)
    except FerrumError as error:
        reason = error.message
    except Exception as error:  # noqa: BLE001  a faulty plug-in is reported, and does not hide the others
        reason = f"it does not describe itself: {type(error).__name__}: {error}"
    return BackendInfo(name, target, False, reason, "", ())
