"""One decoder run beside itself: every named intermediate of a run, row by row, against the float64 run.

The runs are those of one decoder, on three backends: the judge's own in float64 (the oracle), the same in float32 with
two orders of summation (the noise floor), and the one under judgement.  Clauses: PA-MODEL-1..2, PA-MODEL-6, PA-WIDE-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.parity.units import Array

ROUTER = ".router"  # how a layer's point with the logits of its experts ends
Observer = Callable[[str, TensorRef], None]
Chosen = Callable[[str, Array], Array]


class GrowingKv:
    """Keys and values of one sequence, kept by concatenation: the plainest cache a decoder can be given."""

    def __init__(self, backend: ComputeBackend) -> None:
        kernels = backend.kernel_ops()
        attention = kernels.attention_ops() if kernels is not None else None
        if attention is None:
            raise UnsupportedError(f"parity: backend {backend.name()!r} offers no attention; a model cannot run on it")
        self._attention: AttentionOps = attention
        self._ops = backend.tensor_ops()
        self._keys: dict[int, TensorRef] = {}
        self._values: dict[int, TensorRef] = {}

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Keeps k, v `[N, G, D]` behind what is there."""
        for held, new in ((self._keys, k), (self._values, v)):
            held[layer] = self._ops.concat([held[layer], new], 0) if layer in held else new

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        """q `[N, H, D]` over everything kept, causal."""
        extra = {} if sinks is None else {"sinks": sinks}
        queries, keys, values = (
            part.reshape((1, *part.shape())) for part in (q, self._keys[layer], self._values[layer])
        )
        return self._attention.attention(queries, keys, values, params, **extra).reshape(q.shape())


class Forward(Protocol):
    """A decoder on a backend: logits of every row of `token_ids`, which start at position `start`."""

    def __call__(self, token_ids: Sequence[int], start: int, kv: GrowingKv, observe: Observer | None) -> TensorRef: ...


@dataclass(frozen=True, slots=True)
class Run:
    """A decoder and the backend that its caches are made on."""

    forward: Forward
    backend: ComputeBackend

    def observed(self, text: Sequence[int], observe: Observer) -> None:
        """One forward over the whole text, which `observe` watches."""
        self.forward(text, 0, GrowingKv(self.backend), observe)


@dataclass(slots=True)
class Trace:
    """A run's points in order: their values, and which experts each row went to, by the name of the router's point."""

    values: dict[str, Array] = field(default_factory=dict)
    chosen: dict[str, Array] = field(default_factory=dict)


def trace_run(run: Run, text: Sequence[int], chosen: Chosen | None = None) -> Trace:
    """Every named intermediate in float64; `chosen(name, router logits)` gives the experts of each row, (T, k)."""
    trace = Trace()

    def keep(name: str, tensor: TensorRef) -> None:
        values = np.array(tensor.to_numpy(), dtype=np.float64)
        trace.values[name] = values
        if chosen is not None and name.endswith(ROUTER):
            trace.chosen[name] = chosen(name, values)

    run.observed(text, keep)
    return trace


@dataclass(slots=True)
class Deviation:
    """How far a run lies from the float64 run: squares of the error of every row at every point, and its logits."""

    squares: dict[str, Array] = field(default_factory=dict)
    chosen: dict[str, Array] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: np.zeros((0, 0)))


def deviation_of(run: Run, text: Sequence[int], wide: Trace, chosen: Chosen | None = None) -> Deviation:
    """`run` over `text` beside its float64 run; only one point's values are held at a time. Pure."""
    found = Deviation()

    def compare(name: str, tensor: TensorRef) -> None:
        values = np.array(tensor.to_numpy(), dtype=np.float64)
        found.squares[name] = row_squares(values - wide.values[name])
        if chosen is not None and name.endswith(ROUTER):
            found.chosen[name] = chosen(name, values)
        if name == "logits":
            found.logits = values

    run.observed(text, compare)
    return found


def row_squares(values: Array) -> Array:
    """Sum of squares of each row, (T,). Pure."""
    rows = values.reshape(values.shape[0], -1)
    squares: Array = np.vecdot(rows, rows)
    return squares


def relative(squares: Array, of: Array, num_rows: int) -> float:
    """||error|| / ||value|| over the first rows; the error itself where the value is zero. Pure."""
    error, norm = (float(np.sqrt(part[:num_rows].sum())) for part in (squares, of))
    return error / norm if norm else error


def first_other_row(one: Mapping[str, Array], other: Mapping[str, Array], name: str) -> int | None:
    """The first row that goes to other experts at this router; None where all go to the same. Pure."""
    if name not in one or name not in other:
        return None
    differs = (np.sort(one[name], axis=-1) != np.sort(other[name], axis=-1)).any(axis=-1)
    return int(differs.argmax()) if differs.any() else None
