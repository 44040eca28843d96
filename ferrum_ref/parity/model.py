"""Does a whole model come out right?  Its layers and logits on a backend, against a float64 run of the same decoder.

Bounds propagated through thirty layers say nothing, so the yardstick is the noise floor: what plain float32 runs of the
same weights lose. A layer leaves the floor when its error is more than twice that.  Clauses: PA-MODEL-1..7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ferrum_ref.parity.model_trace import (
    ROUTER,
    Chosen,
    Deviation,
    GrowingKv,
    Run,
    Trace,
    deviation_of,
    first_other_row,
    relative,
    row_squares,
    trace_run,
)
from ferrum_ref.parity.units import Array

EMBEDDING = "embedding"
FLOOR_FACTOR = 2.0  # by definition: an honest float32 run stays within twice the loss of another


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
    margin: by how much its choice led at the first difference; num_compared_rows of num_rows: those that no float32 run
    sends to other experts than float64 does, which is all of them in a dense decoder.
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
    num_rows: int
    num_compared_rows: int

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words; empty for a pass."""
        found = []
        if self.first_outside is not None:
            found.append(f"leaves the float32 noise floor at {self.first_outside}")
        if self.logits_error > FLOOR_FACTOR * self.logits_floor:
            found.append(f"logits err by {self.logits_error:.3g}, float32 alone by {self.logits_floor:.3g}")
        if not self.num_compared_rows:
            found.append(
                "nothing could be compared: float32 alone sends the first row to other experts; another prompt"
            )
        near_tie = self.margin is not None and self.margin <= 2.0 * FLOOR_FACTOR * self.logits_floor
        beyond = self.num_prompt_tokens - 1 + self.greedy_prefix >= self.num_compared_rows
        if self.greedy_prefix < self.num_generated and not near_tie and not beyond:
            found.append(
                f"greedy tokens differ after {self.greedy_prefix}, where float64 decides by {self.margin or 0.0:.3g}"
            )
        return found

    @property
    def passed(self) -> bool:
        return not self.faults


def judge_model(
    judged: Run,
    wide: Run,
    floors: Sequence[Run],
    prompt: Sequence[int],
    num_generated: int,
    chosen: Chosen | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelVerdict:
    """Continue `prompt` greedily with `judged`, then compare that whole text with the float64 run.  [PA-MODEL-1..7]

    wide: the same decoder in float64; floors: in float32, one or more; chosen: the experts of each row, of a router's
    point and its logits, where the decoder has experts; num_generated >= 1 tokens; progress(runs done, runs). Pure.
    """
    num_runs = 3 + len(floors)
    told = progress or (lambda _done, _total: None)
    text = greedy_text(judged, prompt, num_generated)
    told(1, num_runs)
    exact = trace_run(wide, text[:-1], chosen)
    told(2, num_runs)
    near = []
    for index, floor in enumerate(floors):
        near.append(deviation_of(floor, text[:-1], exact, chosen))
        told(3 + index, num_runs)
    got = deviation_of(judged, text[:-1], exact, chosen)
    told(num_runs, num_runs)
    return _verdict(prompt, text, exact, near, got)


def greedy_text(run: Run, prompt: Sequence[int], num_generated: int) -> list[int]:
    """The prompt and `num_generated` tokens after it, each the first maximum of the logits before it."""
    text, kv = list(prompt), GrowingKv(run.backend)
    logits = run.forward(text, 0, kv, None)
    for _ in range(num_generated):
        text.append(int(logits.to_numpy()[-1].astype(np.float64).argmax()))
        if len(text) < len(prompt) + num_generated:
            logits = run.forward(text[-1:], len(text) - 1, kv, None)
    return text


def compared_points(exact: Trace, floors: Sequence[Deviation], got: Deviation) -> tuple[list[PointError], int]:
    """Every point's error and floor, and how many rows were compared at the last.  Pure.  [PA-MODEL-2, PA-MODEL-6]

    From a router on, the rows are those before the first that a float32 run sends to other experts; the judged run is
    such a run while its own router logits lie on the floor.
    """
    points, num_rows = [], len(exact.values[EMBEDDING])
    for name, value in exact.values.items():
        norms = row_squares(value)
        point = PointError(
            name,
            relative(got.squares[name], norms, num_rows),
            max(relative(one.squares[name], norms, num_rows) for one in floors),
        )
        points.append(point)
        if name.endswith(ROUTER):
            permitted = [*floors, got] if point.inside else floors
            rows = (first_other_row(exact.chosen, one.chosen, name) for one in permitted)
            num_rows = min([num_rows, *(row for row in rows if row is not None)])
    return points, num_rows


def _first_in_layer(points: Sequence[PointError], layer: str) -> str:
    """The embedding if that is outside the floor already, else the first such intermediate of `layer`."""
    places = (EMBEDDING, f"{layer}.")
    return next(point.name for point in points if point.name.startswith(places) and not point.inside)


def _verdict(
    prompt: Sequence[int], text: Sequence[int], exact: Trace, floors: Sequence[Deviation], got: Deviation
) -> ModelVerdict:
    points, num_rows = compared_points(exact, floors, got)
    layers = tuple(point for point in points if point.name.endswith(".hidden"))
    outside = next((point.name.rpartition(".")[0] for point in layers if not point.inside), None)
    wide, start = exact.values["logits"], len(prompt) - 1
    chosen, best = np.array(text[len(prompt) :]), wide[start:].argmax(axis=-1)
    differs = np.flatnonzero(chosen != best)
    prefix = int(differs[0]) if differs.size else len(chosen)
    margin = None
    if differs.size:
        row = wide[start + prefix]
        margin = float(row[best[prefix]] - row[chosen[prefix]])
    kept, mine = wide[:num_rows], got.logits[:num_rows]
    divergence = _divergence(kept, mine)
    return ModelVerdict(
        num_prompt_tokens=len(prompt),
        num_generated=len(chosen),
        layers=layers,
        first_outside=None if outside is None else _first_in_layer(points, outside),
        logits_error=float(np.abs(mine - kept).max(initial=0.0)),
        logits_floor=max(float(np.abs(one.logits[:num_rows] - kept).max(initial=0.0)) for one in floors),
        kl_mean=float(divergence.mean()) if num_rows else 0.0,
        kl_max=float(divergence.max(initial=0.0)),
        top1_agreement=float(np.mean(mine.argmax(axis=-1) == kept.argmax(axis=-1))) if num_rows else 0.0,
        greedy_prefix=prefix,
        margin=margin,
        text_token_ids=tuple(int(token) for token in text),
        num_rows=len(wide),
        num_compared_rows=num_rows,
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
