"""What the runner needs to know of an operation.  Clauses: PA-CASE-1..5, PA-TIER-1..4."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity.choices import Choice, Law
from ferrum_ref.parity.error_model import DET, PROB, SHARP, ErrorModel
from ferrum_ref.parity.statistical import reach_of
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

LONGEST_SHAPE = 8  # sizes that a label spells out
IID = "iid"
NOT_FINITE, OVERFLOW = "not finite", "overflow"
DRAWN = "drawn"  # its sizes are drawn too; the case that comes of it is `iid`
RANDOM = frozenset(
    {
        "strided", "head-major", "transposed weight", "packed", "flat table", "shared prefix", "scattered positions",
        "last positions", "large", "shifted", "growing residual", "near sqrt(eps)", "below sqrt(eps)", "positive",
        "wide", "large scores", "offset", "window edge", "sinks", "soft cap", "ragged",
        "offset below", "unused entries -1",
    }
)  # fmt: skip
"""Probes of independent random numbers, though not of mean zero or not contiguous: they get the prob tier."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of an operation's list: its sizes and its probe. Its number on the command line is its place in the list.

    probe "iid" means independent random data of mean zero; `small` cases cost milliseconds.
    """

    probe: str
    sizes: Mapping[str, Any]
    small: bool = True

    @property
    def label(self) -> str:
        return " ".join([*(f"{name}={_short(size)}" for name, size in self.sizes.items()), self.probe])

    @property
    def tiers(self) -> tuple[str, ...]:
        """The bounds that this case's data allow.  [PA-TIER-1..3]"""
        if self.probe == IID:
            return DET, PROB, SHARP
        return (DET, PROB) if self.probe in RANDOM else (DET,)


def _short(size: object) -> str:
    if isinstance(size, tuple) and len(size) > LONGEST_SHAPE:
        return f"{size[0]}x{size[1]}x..x{size[-1]}"
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
    """One output: its float64 value (or exact integers), its axes by name, and what may be told from it.

    det, prob, sharp: the bounds of the tiers that apply; no det bound means bit for bit. reach: how far a single
    stored result may lie from the value, and factor: how far from 1 a factor that all results share may lie, for the
    statistical tier. choice: which indices are admissible, instead of one
    value; law: from which distribution they come.
    """

    name: str
    value: Array
    axes: tuple[str, ...]
    dtype: np.dtype[Any]
    det: Array | None = None
    sharp: Array | None = None
    prob: Array | None = None
    reach: Array | None = None
    storage: Storage | None = None
    choice: Choice | None = None
    law: Law | None = None
    factor: float | None = None


class Operation(ABC):
    """An operation under judgement. Instances are stateless."""

    name: ClassVar[str]
    cases: ClassVar[tuple[Case, ...]]

    @property
    def algorithm_name(self) -> str:
        """The name under which a backend declares how it computes this operation."""
        return self.name

    def drawn(self, rng: np.random.Generator) -> Case:
        """A case of random sizes for a "drawn" row of the list.  [PA-CASE-4]"""
        return case(IID, **self.draw_sizes(rng))

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Random sizes; this default body repeats those of a random `iid` case."""
        rows = [row for row in self.cases if row.probe == IID and row.small]
        return rows[int(rng.integers(len(rows)))].sizes

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
    """One error model for each tier that this case gets, det first.  [PA-TIER-1..3]"""
    return [ErrorModel(algorithm, inputs.storage, tier, num_outputs) for tier in inputs.case.tiers]


def bounded(
    name: str, value: Array, axes: tuple[str, ...], models: Sequence[ErrorModel], errors: Sequence[Array]
) -> Expected:
    """An output with the bounds that `errors`, one for each of `models`, have once the result is stored."""
    bounds = {model.tier: model.stored(error, value) for model, error in zip(models, errors, strict=True)}
    storage = models[0].storage
    reach = reach_of(models[-1], value, errors[-1])
    return Expected(
        name, value, axes, storage.numpy_dtype, bounds[DET], bounds.get(SHARP), bounds.get(PROB), reach, storage
    )


def exact(name: str, value: Array, axes: tuple[str, ...] | None = None) -> Expected:
    """An output that must come out bit for bit."""
    return Expected(name, value, axes or axes_of(value.ndim), value.dtype)


def axes_of(rank: int, *last: str) -> tuple[str, ...]:
    """The names of an output's axes: axis0, axis1, ... for those without a meaning, then those of the last ones."""
    names = (*(f"axis{index}" for index in range(rank - len(last))), *last)
    return names[len(names) - rank :]
