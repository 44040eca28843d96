"""Logits processors: what one may look at, the processors themselves, and the chain that orders them.

Every processor works in place on one vector of logits (V,): it computes in float64, rounds once to the vector's own
type, keeps -inf at -inf and lets NaN through (the sampler refuses NaN).  All names are re-exported by
`interfaces.sampler`, the counterpart of upstream's `ferrum_interfaces::sampler`.
Clauses: SA-CONTEXT, SA-CHAIN, SA-TEMPERATURE, SA-TOPK, SA-TOPP, SA-MINP, SA-REPETITION, SA-PRESENCE (specs/sampler.md).
"""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.sampling import SamplingParams

Logits: TypeAlias = NDArray[np.floating[Any]]
TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

GREEDY_BELOW = 1e-5  # temperatures below this mean greedy choice (D-71)


class ProcessorPriority(enum.IntEnum):
    """Order in a chain: the larger runs first."""

    High = 3
    Normal = 2
    Low = 1


@dataclass(slots=True)
class SamplingContext:
    """All that a processor or sampler may look at; `logits` is modified in place.  [SA-CONTEXT-1..2]

    previous_tokens: prompt and generated ids, duplicates allowed. token_frequencies: how often each id was generated.
    vocab_size informs only: the bound of an id is len(logits).
    """

    step: int
    sampling_params: SamplingParams
    logits: Logits
    previous_tokens: TokenIds
    token_frequencies: Mapping[int, int]
    vocab_size: int
    metadata: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def new(
        step: int,
        sampling_params: SamplingParams,
        logits: Logits,
        previous_tokens: TokenIds,
        token_frequencies: Mapping[int, int],
        vocab_size: int,
    ) -> SamplingContext:
        return SamplingContext(step, sampling_params, logits, previous_tokens, token_frequencies, vocab_size)

    def get_logit(self, token_id: int) -> float | None:
        """The logit, or None for an id out of range.  Pure."""
        return float(self.logits[token_id]) if 0 <= token_id < len(self.logits) else None

    def set_logit(self, token_id: int, value: float) -> bool:
        """Write one logit; False, and nothing written, for an id out of range."""
        if not 0 <= token_id < len(self.logits):
            return False
        self.logits[token_id] = value
        return True

    def mask_tokens(self, token_ids: TokenIds) -> None:
        """Set these ids to -inf; ids out of range are passed over."""
        self.logits[_in_range(token_ids, len(self.logits))] = -np.inf


class LogitsProcessor(abc.ABC):
    """Changes `ctx.logits` in place."""

    @abc.abstractmethod
    def process(self, ctx: SamplingContext) -> None: ...

    @abc.abstractmethod
    def name(self) -> str: ...

    def priority(self) -> ProcessorPriority:
        return ProcessorPriority.Normal


class LogitsProcessorChain:
    """Processors in order of priority, High first; inside one priority in order of insertion.  [SA-CHAIN-1..2; D-34]"""

    __slots__ = ("_processors",)

    def __init__(self, processors: Sequence[LogitsProcessor] = ()) -> None:
        self._processors = tuple(sorted(processors, key=lambda p: -p.priority()))

    @staticmethod
    def new() -> LogitsProcessorChain:
        return LogitsProcessorChain()

    def add_processor(self, processor: LogitsProcessor) -> LogitsProcessorChain:
        """A new chain with one processor more; this one stays as it was."""
        return LogitsProcessorChain((*self._processors, processor))

    def process(self, ctx: SamplingContext) -> None:
        """Run all, in order; the first error ends the run."""
        for processor in self._processors:
            processor.process(ctx)

    def processor_names(self) -> list[str]:
        return [p.name() for p in self._processors]

    def __len__(self) -> int:
        return len(self._processors)


class TemperatureProcessor(LogitsProcessor):
    """x / T; T = 1 and T below 1e-5 (which means greedy choice) leave the logits alone.  [SA-TEMPERATURE-1..2; D-71]

    Raises InvalidParameterError for a T that is negative, NaN or infinite.
    """

    temperature: float

    def __init__(self, temperature: float, *, priority: ProcessorPriority = ProcessorPriority.Low) -> None:
        self.temperature = _number("TemperatureProcessor", "temperature", temperature, low=0.0, open_low=False)
        self._priority = priority

    @staticmethod
    def new(temperature: float) -> TemperatureProcessor:
        return TemperatureProcessor(temperature)

    def process(self, ctx: SamplingContext) -> None:
        if self.temperature != 1.0 and self.temperature >= GREEDY_BELOW:
            with np.errstate(over="ignore"):
                ctx.logits[:] = ctx.logits.astype(np.float64) / self.temperature

    def name(self) -> str:
        return "temperature"

    def priority(self) -> ProcessorPriority:
        return self._priority


class TopKProcessor(LogitsProcessor):
    """Keep the k largest and every tie with the k-th; `exact_k`: of the ties the lower ids.  [SA-TOPK-1..2; D-37]

    k = 0 and k >= V keep everything. Raises InvalidParameterError for a negative k.
    """

    k: int

    def __init__(self, k: int, *, exact_k: bool = False) -> None:
        if k < 0:
            raise InvalidParameterError(f"TopKProcessor: k must be >= 0, got {k}")
        self.k = k
        self.exact_k = exact_k

    @staticmethod
    def new(k: int) -> TopKProcessor:
        return TopKProcessor(k)

    def process(self, ctx: SamplingContext) -> None:
        size = len(ctx.logits)
        if 0 < self.k < size:
            threshold = np.partition(ctx.logits, size - self.k)[size - self.k]
            num_above = int(np.count_nonzero(ctx.logits > threshold))
            _keep_head(ctx.logits, threshold, self.k - num_above if self.exact_k else size)

    def name(self) -> str:
        return "top_k"


class TopPProcessor(LogitsProcessor):
    """Keep token i of the descending order (ties: lower id first) iff the mass before it is < p.  [SA-TOPP-1..3; D-33]

    The mass is that of softmax(logits) as they stand, summed in float64 in descending order; the first token always
    stays. p >= 1 keeps everything. Raises InvalidParameterError for p <= 0 or NaN.
    Source: Holtzman et al. 2020, "The curious case of neural text degeneration".
    """

    p: float

    def __init__(self, p: float) -> None:
        self.p = _number("TopPProcessor", "p", p, low=0.0, open_low=True)

    @staticmethod
    def new(p: float) -> TopPProcessor:
        return TopPProcessor(p)

    def process(self, ctx: SamplingContext) -> None:
        logits = ctx.logits
        peak = float(logits.max()) if len(logits) else -math.inf
        if self.p >= 1.0 or not math.isfinite(peak):
            return  # nothing to cut, or nothing that the sampler would accept
        descending = np.sort(logits)[::-1]
        mass = np.cumsum(np.exp(descending.astype(np.float64) - peak))
        num_kept = min(1 + int(np.searchsorted(mass, self.p * mass[-1], side="left")), len(logits))
        cut = descending[num_kept - 1]
        _keep_head(logits, cut, int(np.count_nonzero(descending[:num_kept] == cut)))

    def name(self) -> str:
        return "top_p"


class MinPProcessor(LogitsProcessor):
    """Keep p_i >= min_p * max(p).  [SA-MINP-1; D-20]

    An extension. Raises InvalidParameterError for min_p outside (0, 1].
    Source: Nguyen et al. 2024, "Turning up the heat: min-p sampling".
    """

    def __init__(self, min_p: float) -> None:
        self.min_p = _number("MinPProcessor", "min_p", min_p, low=0.0, open_low=True, high=1.0)

    def process(self, ctx: SamplingContext) -> None:
        peak = float(ctx.logits.max()) if len(ctx.logits) else -math.inf
        if math.isfinite(peak):
            small = np.exp(ctx.logits.astype(np.float64) - peak) < self.min_p
            ctx.logits[:] = np.where(small, -np.inf, ctx.logits)

    def name(self) -> str:
        return "min_p"


class RepetitionPenaltyProcessor(LogitsProcessor):
    """Once for each distinct id of previous_tokens: x / penalty if x > 0, else x * penalty.  [SA-REPETITION-1..2; D-02]

    token_frequencies is not consulted. Raises InvalidParameterError for a penalty <= 0 or NaN (D-70).
    Source: Keskar et al. 2019, "CTRL", section 4.1.
    """

    penalty: float

    def __init__(self, penalty: float) -> None:
        self.penalty = _number("RepetitionPenaltyProcessor", "penalty", penalty, low=0.0, open_low=True)

    @staticmethod
    def new(penalty: float) -> RepetitionPenaltyProcessor:
        return RepetitionPenaltyProcessor(penalty)

    def process(self, ctx: SamplingContext) -> None:
        if self.penalty != 1.0:
            ids = np.unique(_in_range(ctx.previous_tokens, len(ctx.logits)))
            values = ctx.logits[ids].astype(np.float64)
            ctx.logits[ids] = np.where(values > 0, values / self.penalty, values * self.penalty)

    def name(self) -> str:
        return "repetition_penalty"

    def priority(self) -> ProcessorPriority:
        return ProcessorPriority.High


class PresenceFrequencyProcessor(LogitsProcessor):
    """x - frequency * count - presence, for the ids of token_frequencies with count > 0.  [SA-PRESENCE-1; D-20]

    An extension. Raises InvalidParameterError for a penalty that is not finite.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence = _number("PresenceFrequencyProcessor", "presence", presence)
        self.frequency = _number("PresenceFrequencyProcessor", "frequency", frequency)

    def process(self, ctx: SamplingContext) -> None:
        size = len(ctx.logits)
        seen = [(t, n) for t, n in ctx.token_frequencies.items() if n > 0 and 0 <= t < size]
        if seen:
            ids, counts = np.array(seen, dtype=np.int64).T
            ctx.logits[ids] = ctx.logits[ids].astype(np.float64) - (self.frequency * counts + self.presence)

    def name(self) -> str:
        return "presence_frequency"

    def priority(self) -> ProcessorPriority:
        return ProcessorPriority.High


def _in_range(token_ids: TokenIds, size: int) -> NDArray[np.int64]:
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < size)]


def _keep_head(logits: Logits, cut: Any, num_ties: int) -> None:
    """Mask what is below `cut`, and of what equals it all but the `num_ties` lowest ids.  In place."""
    logits[:] = np.where(logits < cut, -np.inf, logits)  # NaN stays: the sampler names it
    ties = np.flatnonzero(logits == cut)
    if len(ties) > num_ties:
        logits[ties[num_ties:]] = -np.inf


def _number(
    owner: str, name: str, value: float, low: float = -math.inf, open_low: bool = True, high: float = math.inf
) -> float:
    if not math.isfinite(value) or not (low < value if open_low else low <= value) or value > high:
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
        raise InvalidParameterError(f"{owner}: {name} must be a number in {interval}, got {value!r}")
    return float(value)
