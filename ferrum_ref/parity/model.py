"""Does a whole model come out right?  Its layers and logits on a backend, against a float64 run of the same weights.

Bounds propagated through thirty layers say nothing, so the yardstick is the noise floor: what plain float32 runs of the
same weights lose. A layer leaves the floor when its error is more than twice that.  Clauses: PA-MODEL-1..5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.parity.model_trace import FLOOR, WIDE, Weights, trace_model
from ferrum_ref.parity.units import Array

FLOOR_FACTOR = 2.0  # by definition: an honest float32 run stays within twice the loss of another
Observer = Callable[[str, TensorRef], None]


class Forward(Protocol):
    """The decoder under judgement: logits of every row of `token_ids`, which start at position `start`."""

    def __call__(self, token_ids: Sequence[int], start: int, kv: GrowingKv, observe: Observer | None) -> TensorRef: ...


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


@dataclass(frozen=True, slots=True)
class PointError:
    """Relative error ||got - wide|| / ||wide|| at one named point, beside the noise floor's."""

    name: str
    error: float
    floor: float

    @property
    def inside(self) -> bool:
        return self.error <= FLOOR_FACTOR * self.floor


@dataclass(frozen=True, slots=True)
class ModelVerdict:
    """What came out of one model on one backend.  [PA-MODEL-3..5]

    layers: the hidden state after each layer; first_outside: the first intermediate of the first layer that leaves the
    floor, None if none does; logits_error and logits_floor: largest absolute error; kl_*: of the next-token
    distribution from the float64 one, in nats; greedy_prefix of num_generated tokens are the float64 run's own choice;
    margin: by how much its choice led at the first difference.
    """

    num_prompt_tokens: int
    num_generated: int
    layers: tuple[PointError, ...]
    first_outside: str | None
    logits_error: float
    logits_floor: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    greedy_prefix: int
    margin: float | None
    text_token_ids: tuple[int, ...]

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words; empty for a pass."""
        found = []
        if self.first_outside is not None:
            found.append(f"leaves the float32 noise floor at {self.first_outside}")
        if self.logits_error > FLOOR_FACTOR * self.logits_floor:
            found.append(f"logits err by {self.logits_error:.3g}, float32 alone by {self.logits_floor:.3g}")
        near_tie = self.margin is not None and self.margin <= 2.0 * FLOOR_FACTOR * self.logits_floor
        if self.greedy_prefix < self.num_generated and not near_tie:
            found.append(
                f"greedy tokens differ after {self.greedy_prefix}, where float64 decides by {self.margin or 0.0:.3g}"
            )
        return found

    @property
    def passed(self) -> bool:
        return not self.faults


def judge_model(
    weights: Weights,
    tables: tuple[Array, Array],
    forward: Forward,
    new_kv: Callable[[], GrowingKv],
    prompt: Sequence[int],
    num_generated: int,
    progress: Callable[[int, int], None] | None = None,
) -> ModelVerdict:
    """Continue `prompt` greedily on the backend, then compare that whole text with the float64 run.  [PA-MODEL-1..5]

    weights, tables: as `trace_model`; forward: the decoder on the backend; num_generated >= 1 tokens. Pure.
    """
    text = greedy_text(forward, new_kv(), prompt, num_generated)
    observed: dict[str, Array] = {}

    def keep(name: str, tensor: TensorRef) -> None:
        observed[name] = tensor.to_numpy().astype(np.float64)

    forward(text[:-1], 0, new_kv(), keep)
    points, wide_logits, floor_logits = [], np.zeros((0, 0)), 0.0
    for name, (wide, *floors) in trace_model(weights, text[:-1], tables, (WIDE, *FLOOR), progress):
        points.append(PointError(name, _relative(observed[name], wide), max(_relative(one, wide) for one in floors)))
        if name == "logits":
            wide_logits, floor_logits = wide, max(float(np.abs(one - wide).max()) for one in floors)
    layers = tuple(point for point in points if point.name.endswith(".hidden"))
    outside = next((point.name.rpartition(".")[0] for point in layers if not point.inside), None)
    first = None if outside is None else _first_in_layer(points, outside)
    return _verdict(prompt, text, layers, first, observed["logits"], wide_logits, floor_logits)


def greedy_text(forward: Forward, kv: GrowingKv, prompt: Sequence[int], num_generated: int) -> list[int]:
    """The prompt and `num_generated` tokens after it, each the first maximum of the logits before it."""
    text = list(prompt)
    logits = forward(text, 0, kv, None)
    for _ in range(num_generated):
        text.append(int(logits.to_numpy()[-1].astype(np.float64).argmax()))
        if len(text) < len(prompt) + num_generated:
            logits = forward(text[-1:], len(text) - 1, kv, None)
    return text


def _relative(got: Array, wide: Array) -> float:
    norm = float(np.linalg.norm(wide))
    error = float(np.linalg.norm(got.astype(np.float64) - wide))
    return error / norm if norm else error


def _first_in_layer(points: Sequence[PointError], layer: str) -> str:
    """The first intermediate of `layer` outside the floor; its hidden state at the latest."""
    return next(point.name for point in points if point.name.startswith(f"{layer}.") and not point.inside)


def _verdict(
    prompt: Sequence[int],
    text: Sequence[int],
    layers: tuple[PointError, ...],
    first_outside: str | None,
    got: Array,
    wide: Array,
    floor: float,
) -> ModelVerdict:
    start = len(prompt) - 1
    chosen, best = np.array(text[len(prompt) :]), wide[start:].argmax(axis=-1)
    differs = np.flatnonzero(chosen != best)
    prefix = int(differs[0]) if differs.size else len(chosen)
    margin = None
    if differs.size:
        row = wide[start + prefix]
        margin = float(row[best[prefix]] - row[chosen[prefix]])
    divergence = _divergence(wide, got)
    return ModelVerdict(
        len(prompt),
        len(chosen),
        layers,
        first_outside,
        float(np.abs(got - wide).max()),
        floor,
        float(divergence.mean()),
        float(divergence.max()),
        float(np.mean(got.argmax(axis=-1) == wide.argmax(axis=-1))),
        prefix,
        margin,
        tuple(int(token) for token in text),
    )


def _divergence(wide: Array, got: Array) -> Array:
    """KL(softmax(wide) || softmax(got)) of each row, in nats."""

    def log_softmax(logits: Array) -> Array:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return logs

    first, second = log_softmax(wide), log_softmax(got)
    divergence: Array = np.maximum(np.sum(np.exp(first) * (first - second), axis=-1), 0.0)
    return divergence
