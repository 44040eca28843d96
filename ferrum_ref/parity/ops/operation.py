"""What the runner needs to know of an operation.  Clauses: PA-CASE-1..3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

IID = "iid"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of an operation's list: its sizes and its probe. Its number on the command line is its place in the list.

    probe "iid" means independent random data, and only such a case gets the sharp tier; `small` ones cost milliseconds.
    """

    probe: str
    sizes: Mapping[str, Any]
    small: bool = True

    @property
    def label(self) -> str:
        return " ".join([*(f"{name}={_short(size)}" for name, size in self.sizes.items()), self.probe])


def _short(size: object) -> str:
    if isinstance(size, tuple):
        return "x".join(str(part) for part in size) or "scalar"
    return f"{size:g}" if isinstance(size, float) else str(size)


def case(probe: str, /, *, small: bool = True, **sizes: Any) -> Case:
    """`Case` with its sizes as keywords."""
    return Case(probe, sizes, small)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one case feeds in: arrays as stored (views may be strided), and settings that are not arrays."""

    case: Case
    storage: Storage
    arrays: Mapping[str, Array]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def exact(self, name: str) -> Array:
        """The stored values of one array as float64: an exact conversion."""
        with np.errstate(invalid="ignore"):  # a signalling NaN in a slot that nobody reads
            return np.asarray(self.arrays[name]).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Expected:
    """One output: its float64 value (or exact integers), its axes by name, its bounds; no bound means bit for bit."""

    name: str
    value: Array
    axes: tuple[str, ...]
    dtype: np.dtype[Any]
    det: Array | None = None
    sharp: Array | None = None


class Operation(ABC):
    """An operation under judgement. Instances are stateless."""

    name: ClassVar[str]
    cases: ClassVar[tuple[Case, ...]]

    @abstractmethod
    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        """The inputs of `case`, every random number taken from `rng`."""

    @abstractmethod
    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        """The backend's outputs as host arrays, reached through the contracts alone.

        Raises UnsupportedError if the backend does not offer the operation.
        """

    @abstractmethod
    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        """The oracle's outputs with the bounds of `algorithm`. Pure."""


def models_of(inputs: Inputs, algorithm: Algorithm, num_outputs: int) -> list[ErrorModel]:
    """The tiers that this case gets: det always, sharp on independent data.  [PA-TIER-2]"""
    det = ErrorModel(algorithm, inputs.storage)
    return [det, det.sharpened(num_outputs)] if inputs.case.probe == IID else [det]


def bounded(
    name: str, value: Array, axes: tuple[str, ...], models: Sequence[ErrorModel], errors: Sequence[Array]
) -> Expected:
    """An output with the bounds that `errors`, one for each of `models`, have once the result is stored."""
    bounds = [model.stored(error, value) for model, error in zip(models, errors, strict=True)]
    return Expected(name, value, axes, models[0].storage.numpy_dtype, bounds[0], bounds[1] if len(bounds) > 1 else None)
