"""Samplers: the choice of the next token from a vector of logits, and the pipeline processors -> sampler.

Upstream: `ferrum_interfaces::sampler`; the processors are in `logits_processor` beside this file and re-exported here.
Clauses: SA-GREEDY, SA-MULTINOMIAL, SA-CONFIG, SA-BUILDER (specs/sampler.md).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.logits_processor import (
    GREEDY_BELOW,
    Logits,
    LogitsProcessor,
    LogitsProcessorChain,
    MinPProcessor,
    PresenceFrequencyProcessor,
    ProcessorPriority,
    RepetitionPenaltyProcessor,
    SamplingContext,
    TemperatureProcessor,
    TopKProcessor,
    TopPProcessor,
)
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.record import F64, U64, Record
from ferrum_ref.types.sampling import ResponseFormat, SamplingParams

__all__ = [
    "GreedySampler", "Logits", "LogitsProcessor", "LogitsProcessorChain", "MinPProcessor", "MultiSampler",
    "MultinomialSampler", "Order", "PresenceFrequencyProcessor", "ProcessorPriority", "RandomSource",
    "RepetitionPenaltyProcessor", "Sampler", "SamplingConfig", "SamplingConfigBuilder", "SamplingContext",
    "SamplingStats", "TemperatureProcessor", "TopKProcessor", "TopPProcessor",
]  # fmt: skip

Order: TypeAlias = Literal["temperature_last", "temperature_first"]


class RandomSource(Protocol):
    """A source of uniform 32-bit integers."""

    def next_u32(self) -> int: ...


class Sampler(abc.ABC):
    """Picks one id from logits (V,)."""

    @abc.abstractmethod
    def sample(self, logits: Logits, rng: RandomSource) -> TokenId:
        """The chosen id.  Pure in `logits`.  Raises BackendError on empty, NaN or all -inf.  [SA-GREEDY-3]"""

    def sample_with_context(self, ctx: SamplingContext, rng: RandomSource) -> TokenId:
        """As `sample(ctx.logits, rng)` unless a sampler needs the context."""
        return self.sample(ctx.logits, rng)

    @abc.abstractmethod
    def name(self) -> str: ...

    @abc.abstractmethod
    def is_deterministic(self) -> bool:
        """True when the random source is never used."""


class MultiSampler(Sampler):
    """Several draws from one vector of logits."""

    @abc.abstractmethod
    def sample_multiple(self, logits: Logits, num_samples: int, rng: RandomSource) -> list[TokenId]: ...

    @abc.abstractmethod
    def sample_with_probabilities(self, logits: Logits, rng: RandomSource) -> tuple[TokenId, NDArray[np.float64]]: ...


class GreedySampler(Sampler):
    """argmax(logits): the lowest id among the largest; +inf may win.  [SA-GREEDY-1..3; D-03, D-62]"""

    def sample(self, logits: Logits, rng: RandomSource) -> TokenId:
        _largest("GreedySampler", logits)
        return TokenId(int(np.argmax(logits)))

    def name(self) -> str:
        return "greedy"

    def is_deterministic(self) -> bool:
        return True


class MultinomialSampler(Sampler):
    """One draw from softmax(logits).  [SA-MULTINOMIAL-1..3; D-10, D-62]

    With u = next_u32() / 2**32 and running sums c of exp(x - max) in float64: the first id with c > u * c[V-1], which
    always has positive probability. One u32 is drawn a call. Raises BackendError on +inf as well.
    """

    def sample(self, logits: Logits, rng: RandomSource) -> TokenId:
        peak = _largest("MultinomialSampler", logits)
        if peak == np.inf:
            raise BackendError("MultinomialSampler: infinite logits; expected finite values or -inf")
        ids = np.flatnonzero(logits > -np.inf)
        sums = np.cumsum(np.exp(logits[ids].astype(np.float64) - peak))
        target = rng.next_u32() / 2**32 * sums[-1]
        return TokenId(int(ids[np.searchsorted(sums, target, side="right")]))

    def name(self) -> str:
        return "multinomial"

    def is_deterministic(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """A ready pipeline: the chain, then the sampler.  [SA-CONFIG-1..4]"""

    processor_chain: LogitsProcessorChain
    sampler: Sampler

    @staticmethod
    def from_params(params: SamplingParams, *, order: Order = "temperature_last") -> SamplingConfig:
        """The pipeline of a request's parameters.  [SA-CONFIG-1..3; D-20, D-34, D-71, D-82]

        Penalties, top_k, top_p, min_p, temperature; with order="temperature_first" the temperature comes right after
        the penalties. The sampler is greedy below T = 1e-5, else multinomial; the processors run in either case. seed
        and stop_sequences concern whoever drives the pipeline. Raises UnsupportedError for tfs, typical_p, mirostat and
        a constrained response format, InvalidParameterError for a value outside its domain.
        """
        for name in ("tfs", "typical_p", "mirostat"):
            if getattr(params, name) is not None:
                raise UnsupportedError(
                    f"SamplingConfig.from_params: {name} is not offered; leave it None, or use min_p"
                )
        if params.response_format != ResponseFormat.Text:
            raise UnsupportedError(
                f"SamplingConfig.from_params: response_format {params.response_format.type} is not offered; use Text"
            )
        builder = SamplingConfigBuilder.new(order=order).with_repetition_penalty(params.repetition_penalty)
        builder = builder.with_presence_frequency(params.presence_penalty, params.frequency_penalty)
        builder = builder.with_temperature(params.temperature)
        if params.top_k is not None:
            builder = builder.with_top_k(params.top_k)
        builder = builder.with_top_p(params.top_p)
        if params.min_p is not None:
            builder = builder.with_min_p(params.min_p)
        return builder.build()

    def sample(self, ctx: SamplingContext, rng: RandomSource) -> TokenId:
        """Run the chain on `ctx` (in place), then choose."""
        self.processor_chain.process(ctx)
        return self.sampler.sample_with_context(ctx, rng)


class SamplingConfigBuilder:
    """Assembles a SamplingConfig; every `with_*` returns a changed copy.  [SA-BUILDER-1..2]"""

    __slots__ = ("_cold", "_order", "_processors", "_sampler")

    def __init__(
        self,
        processors: Sequence[LogitsProcessor] = (),
        sampler: Sampler | None = None,
        *,
        cold: bool = False,
        order: Order = "temperature_last",
    ) -> None:
        if order not in ("temperature_last", "temperature_first"):
            raise InvalidParameterError(
                f"sampling order: got {order!r}; expected temperature_last or temperature_first"
            )
        self._processors, self._sampler, self._cold, self._order = tuple(processors), sampler, cold, order

    @staticmethod
    def new(*, order: Order = "temperature_last") -> SamplingConfigBuilder:
        return SamplingConfigBuilder(order=order)

    def _with(self, *added: LogitsProcessor, cold: bool | None = None) -> SamplingConfigBuilder:
        return SamplingConfigBuilder(
            (*self._processors, *added), self._sampler, cold=self._cold if cold is None else cold, order=self._order
        )

    def with_temperature(self, temperature: float) -> SamplingConfigBuilder:
        """Nothing is added for 1; below 1e-5 the default sampler becomes the greedy one (D-71)."""
        priority = ProcessorPriority.Low if self._order == "temperature_last" else ProcessorPriority.Normal
        processor = TemperatureProcessor(temperature, priority=priority)
        cold = temperature < GREEDY_BELOW
        return self._with(cold=cold) if cold or temperature == 1.0 else self._with(processor, cold=False)

    def with_top_k(self, k: int) -> SamplingConfigBuilder:
        processor = TopKProcessor(k)
        return self._with(processor) if k > 0 else self

    def with_top_p(self, p: float) -> SamplingConfigBuilder:
        return self if p >= 1.0 else self._with(TopPProcessor(p))

    def with_min_p(self, min_p: float) -> SamplingConfigBuilder:
        return self._with(MinPProcessor(min_p))

    def with_repetition_penalty(self, penalty: float) -> SamplingConfigBuilder:
        return self if penalty == 1.0 else self._with(RepetitionPenaltyProcessor(penalty))

    def with_presence_frequency(self, presence: float, frequency: float) -> SamplingConfigBuilder:
        added = PresenceFrequencyProcessor(presence, frequency)
        return self if presence == 0.0 and frequency == 0.0 else self._with(added)

    def with_sampler(self, sampler: Sampler) -> SamplingConfigBuilder:
        return SamplingConfigBuilder(self._processors, sampler, cold=self._cold, order=self._order)

    def build(self) -> SamplingConfig:
        sampler = self._sampler or (GreedySampler() if self._cold else MultinomialSampler())
        return SamplingConfig(LogitsProcessorChain(self._processors), sampler)


@dataclass(slots=True)
class SamplingStats(Record):
    """What a monitor may keep of the samplings; times in microseconds."""

    total_samples: U64
    avg_sample_time_us: F64
    token_distribution: dict[TokenId, U64]
    effective_temperature: F64
    processor_times: dict[str, F64]


def _largest(owner: str, logits: Logits) -> float:
    """The largest logit.  Raises BackendError when there is none to choose, or one is NaN."""
    if logits.ndim != 1 or not len(logits):
        raise BackendError(f"{owner}: logits must be a vector of at least one, got shape {logits.shape}")
    peak = float(logits.max())
    if np.isnan(peak):
        raise BackendError(f"{owner}: NaN logits, the first at id {int(np.argmax(np.isnan(logits)))}")
    if peak == -np.inf:
        raise BackendError(f"{owner}: No valid tokens for sampling: all {len(logits)} logits are -inf")
    return peak
