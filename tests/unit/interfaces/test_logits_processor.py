"""Logits processors: defect examples, transformers as a second opinion, and laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.interfaces.sampler import (
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
from ferrum_ref.types.sampling import SamplingParams

INF = math.inf


def context(logits: Any, previous: Any = (), counts: dict[int, int] | None = None) -> SamplingContext:
    array = np.array(logits, dtype=np.float32)
    return SamplingContext.new(0, SamplingParams(), array, previous, counts or {}, len(array))


def after(processor: LogitsProcessor, logits: Any, previous: Any = (), counts: Any = None) -> list[float]:
    ctx = context(logits, previous, counts)
    processor.process(ctx)
    return [float(x) for x in ctx.logits]


def kept(processor: LogitsProcessor, logits: Any) -> list[int]:
    return [i for i, x in enumerate(after(processor, logits)) if x != -INF]


vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


@pytest.mark.clause("SA-CONTEXT-1")
def test_ids_out_of_range_are_neither_read_nor_written() -> None:
    ctx = context([1, 2, 3])
    assert [ctx.get_logit(i) for i in (-1, 0, 2, 3)] == [None, 1.0, 3.0, None]
    assert [ctx.set_logit(i, 9.0) for i in (-1, 1, 3)] == [False, True, False]
    ctx.mask_tokens([2, 7, -1])
    assert ctx.logits.tolist() == [1.0, 9.0, -INF]
    assert ctx.metadata == {}


class Recorder(LogitsProcessor):
    def __init__(self, label: str, priority: ProcessorPriority, log: list[str], fail: bool = False) -> None:
        self._label, self._rank, self._log, self._fail = label, priority, log, fail

    def process(self, ctx: SamplingContext) -> None:
        if self._fail:
            raise BackendError(self._label)
        self._log.append(self._label)

    def name(self) -> str:
        return self._label

    def priority(self) -> ProcessorPriority:
        return self._rank


@pytest.mark.clause("SA-CHAIN-1", "SA-CHAIN-2")
def test_a_chain_runs_by_priority_then_insertion_and_stops_at_an_error() -> None:
    log: list[str] = []
    low, normal, high = ProcessorPriority.Low, ProcessorPriority.Normal, ProcessorPriority.High
    chain = LogitsProcessorChain.new()
    for label, rank in [("l1", low), ("n1", normal), ("h1", high), ("n2", normal), ("h2", high), ("l2", low)]:
        longer = chain.add_processor(Recorder(label, rank, log))
        assert label not in chain.processor_names()
        chain = longer
    assert chain.processor_names() == ["h1", "h2", "n1", "n2", "l1", "l2"]
    chain.process(context([0]))
    assert log == chain.processor_names()
    log.clear()
    failing = chain.add_processor(Recorder("broken", normal, log, fail=True))
    with pytest.raises(BackendError, match="broken"):
        failing.process(context([0]))
    assert log == ["h1", "h2", "n1", "n2"]


def test_default_priority_is_normal() -> None:
    assert [p.value for p in (ProcessorPriority.High, ProcessorPriority.Normal, ProcessorPriority.Low)] == [3, 2, 1]
    assert TopKProcessor(1).priority() is ProcessorPriority.Normal


@pytest.mark.clause("SA-TEMPERATURE-1")
def test_temperature_divides_and_overflows_to_infinity() -> None:
    assert after(TemperatureProcessor(2.0), [3, -INF, 1, -4]) == [1.5, -INF, 0.5, -2.0]
    assert after(TemperatureProcessor(1.0), [3, -1]) == [3, -1]
    assert after(TemperatureProcessor(1e-5), [3e38, -3e38]) == [INF, -INF]


@pytest.mark.clause("SA-TEMPERATURE-2")
def test_temperature_domain() -> None:
    assert after(TemperatureProcessor(0.0), [3, 1]) == [3, 1]
    assert after(TemperatureProcessor(9e-6), [3, 1]) == [3, 1]
    for bad in (-1.0, -1e-9, math.nan, INF):
        with pytest.raises(InvalidParameterError, match="temperature"):
            TemperatureProcessor.new(bad)


@pytest.mark.clause("SA-TOPK-1")
def test_top_k_keeps_ties() -> None:
    assert kept(TopKProcessor.new(2), [3, 2, 2, 1]) == [0, 1, 2]
    assert kept(TopKProcessor(0), [3, 2]) == [0, 1]
    assert kept(TopKProcessor(2), [3, 2]) == [0, 1]
    assert kept(TopKProcessor(1), [1, 5, 2]) == [1]
    with pytest.raises(InvalidParameterError):
        TopKProcessor(-1)


@pytest.mark.clause("SA-TOPK-2")
@given(vectors, st.integers(1, 45))
def test_exact_top_k_keeps_exactly_the_first_k_of_a_stable_sort(logits: np.ndarray, k: int) -> None:
    logits = np.round(logits)  # many ties
    expected = sorted(sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k])
    assert kept(TopKProcessor(k, exact_k=True), logits) == expected
    assert set(expected) <= set(kept(TopKProcessor(k), logits))


@pytest.mark.clause("SA-TOPK-2")
def test_a_masked_entry_never_revives() -> None:
    logits = [-INF, 1, -INF, 0]
    for processor in (TopKProcessor(3), TopKProcessor(3, exact_k=True), TopPProcessor(0.999), MinPProcessor(0.01)):
        assert kept(processor, logits) == [1, 3]
    assert after(RepetitionPenaltyProcessor(2.0), logits, previous=[0, 3])[0] == -INF


@pytest.mark.clause("SA-TOPP-1", "SA-TOPP-2")
def test_top_p_cuts_at_equality() -> None:
    assert kept(TopPProcessor.new(0.5), [0, 0]) == [0]
    assert kept(TopPProcessor(0.75), [0, 0, 0, 0]) == [0, 1, 2]
    assert kept(TopPProcessor(0.9), [3, 2, 1, 0]) == [0, 1, 2]
    assert kept(TopPProcessor(1e-9), [1, 3, 3]) == [1]
    assert kept(TopPProcessor(1.0), [1, -50]) == [0, 1]


def top_p_by_definition(logits: np.ndarray, p: float) -> list[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = [math.exp(float(logits[i]) - float(logits.max())) for i in order]
    total, before, chosen = math.fsum(weights), 0.0, []
    for i, weight in zip(order, weights, strict=True):
        if chosen and before >= p * total:
            break
        chosen.append(i)
        before = math.fsum([before, weight])
    return sorted(chosen)


@pytest.mark.clause("SA-TOPP-1")
@given(vectors, st.floats(0.01, 0.999))
def test_top_p_against_its_definition(logits: np.ndarray, p: float) -> None:
    logits = np.round(logits * 4) / 4  # ties, too
    got = kept(TopPProcessor(p), logits)
    assert got == top_p_by_definition(logits, p) or got in (  # an exact tie of mass and p may fall either way
        top_p_by_definition(logits, p * (1 + 1e-12)),
        top_p_by_definition(logits, p * (1 - 1e-12)),
    )


@pytest.mark.clause("SA-TOPP-3")
def test_top_p_domain() -> None:
    for bad in (0.0, -0.1, math.nan):
        with pytest.raises(InvalidParameterError, match="p must"):
            TopPProcessor(bad)
    assert after(TopPProcessor(0.5), [INF, 0]) == [INF, 0]
    assert kept(TopPProcessor(0.5), [-INF, -INF]) == []
    assert math.isnan(after(TopPProcessor(0.5), [math.nan, 0])[0])


@pytest.mark.clause("SA-MINP-1")
def test_min_p() -> None:
    logits = np.log([0.5, 0.26, 0.24])
    assert kept(MinPProcessor(0.5), logits) == [0, 1]
    assert kept(MinPProcessor(1.0), [2, 2, 1]) == [0, 1]
    for bad in (0.0, 1.1, math.nan, -1.0):
        with pytest.raises(InvalidParameterError, match="min_p"):
            MinPProcessor(bad)


@pytest.mark.clause("SA-REPETITION-1")
def test_the_repetition_penalty_applies_once_per_distinct_id() -> None:
    processor = RepetitionPenaltyProcessor.new(2.0)
    assert after(processor, [2, -1, 0.5], previous=[0, 0, 1], counts={0: 2, 1: 1}) == [1, -2, 0.5]
    assert after(processor, [2, -1, 0.5], previous=[0, 0, 1], counts={}) == [1, -2, 0.5]
    assert after(processor, [2, -1, 0.5], previous=np.array([1, 0, 1])) == [1, -2, 0.5]
    thirty_one = after(RepetitionPenaltyProcessor(1.1), [-1.0], previous=[0] * 31, counts={0: 31})
    assert thirty_one == [pytest.approx(-1.1)]


@pytest.mark.clause("SA-REPETITION-2")
def test_the_repetition_penalty_is_positive() -> None:
    for bad in (0.0, -1.0, math.nan, INF):
        with pytest.raises(InvalidParameterError, match="penalty"):
            RepetitionPenaltyProcessor(bad)
    assert after(RepetitionPenaltyProcessor(1.0), [2, 3], previous=[0]) == [2, 3]
    assert after(RepetitionPenaltyProcessor(2.0), [2, 3], previous=[5, -1, 0]) == [1, 3]


@pytest.mark.clause("SA-PRESENCE-1")
def test_presence_and_frequency_penalties() -> None:
    counts = {0: 2, 1: 0, 9: 4, 2: 1}
    assert after(PresenceFrequencyProcessor(0.5, 0.25), [1, 1, -INF, 1], counts=counts) == [0, 1, -INF, 1]
    assert after(PresenceFrequencyProcessor(0.5, 0.25), [1, 2]) == [1, 2]
    with pytest.raises(InvalidParameterError):
        PresenceFrequencyProcessor(math.nan, 0.0)


@pytest.mark.clause("SA-TEMPERATURE-1", "SA-TOPK-1", "SA-TOPP-1", "SA-MINP-1", "SA-REPETITION-1")
@pytest.mark.parametrize("seed", range(5))
def test_transformers_agree_on_random_logits(seed: int) -> None:
    import torch
    from transformers import generation as hf

    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(3000) * 3).astype(np.float32)
    previous = rng.integers(0, 3000, 50)
    pairs: list[tuple[LogitsProcessor, Any]] = [
        (TemperatureProcessor(0.7), hf.TemperatureLogitsWarper(0.7)),
        (TopKProcessor(40), hf.TopKLogitsWarper(40)),
        (TopPProcessor(0.83), hf.TopPLogitsWarper(0.83)),
        (MinPProcessor(0.07), hf.MinPLogitsWarper(0.07)),
        (RepetitionPenaltyProcessor(1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
    ]
    for ours, theirs in pairs:
        expected = theirs(torch.from_numpy(previous)[None], torch.from_numpy(logits.astype(np.float64))[None])[0]
        np.testing.assert_array_equal(after(ours, logits, previous), expected.float().numpy(), err_msg=ours.name())
