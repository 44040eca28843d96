"""Samplers and pipelines: defect examples, and draws against the softmax by chi-square."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.sampler import (
    GreedySampler,
    MultinomialSampler,
    Order,
    Sampler,
    SamplingConfig,
    SamplingConfigBuilder,
    SamplingContext,
)
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import MirostatParams, ResponseFormat, SamplingParams

INF = math.inf


class Draws:
    """A random source that gives what it was told to."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def next_u32(self) -> int:
        return self.values.pop(0)


def vector(*logits: float) -> np.ndarray:
    return np.array(logits, dtype=np.float32)


@pytest.mark.clause("SA-GREEDY-1", "SA-GREEDY-2")
def test_the_first_maximum_wins() -> None:
    greedy = GreedySampler()
    assert greedy.sample(vector(1, 3, 3), Draws()) == 1
    assert isinstance(greedy.sample(vector(1), Draws()), TokenId)
    assert greedy.sample(vector(1, INF, INF, -INF), Draws()) == 1
    assert (greedy.name(), greedy.is_deterministic()) == ("greedy", True)


@pytest.mark.clause("SA-GREEDY-3", "SA-MULTINOMIAL-3")
@pytest.mark.parametrize("sampler", [GreedySampler(), MultinomialSampler()], ids=lambda s: s.name())
@pytest.mark.parametrize(
    ("logits", "message"),
    [((), "at least one"), ((5, math.nan, 1), "NaN logits"), ((-INF, -INF), "No valid tokens")],
)
def test_logits_without_a_choice_are_refused(sampler: Sampler, logits: tuple[float, ...], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        sampler.sample(vector(*logits), Draws(0))


@pytest.mark.clause("SA-MULTINOMIAL-3")
def test_infinite_logits_have_no_softmax() -> None:
    with pytest.raises(BackendError, match="infinite"):
        MultinomialSampler().sample(vector(1, INF), Draws(0))


@pytest.mark.clause("SA-MULTINOMIAL-1")
def test_a_draw_falls_where_the_running_sum_passes_it() -> None:
    sampler = MultinomialSampler()
    quarters = vector(0, 0, 0, 0)
    edges = [0, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 1]
    assert [sampler.sample(quarters, Draws(u)) for u in edges] == [0, 0, 1, 1, 2, 2, 3, 3]
    draws = Draws(7, 8)
    sampler.sample(quarters, draws)
    assert draws.values == [8]
    assert (sampler.name(), sampler.is_deterministic()) == ("multinomial", False)


@pytest.mark.clause("SA-MULTINOMIAL-2")
@given(
    st.lists(st.sampled_from([-INF, -800.0, -50.0, 0.0, 1.0]), min_size=1, max_size=12).filter(lambda x: max(x) > -INF),
    st.one_of(st.sampled_from([0, 1, 2**32 - 1, 4294967168]), st.integers(0, 2**32 - 1)),
)
def test_what_has_no_probability_is_never_drawn(logits: list[float], u: int) -> None:
    token = MultinomialSampler().sample(np.array(logits, dtype=np.float32), Draws(u))
    assert math.exp(logits[token] - max(logits)) > 0.0


@pytest.mark.clause("SA-MULTINOMIAL-2")
def test_the_extreme_draws_of_the_defect_example() -> None:
    for u in (0, 2**32 - 1):
        assert MultinomialSampler().sample(vector(-INF, 0, -INF), Draws(u)) == 1


@pytest.mark.clause("SA-MULTINOMIAL-1", "SA-MULTINOMIAL-3")
@pytest.mark.parametrize("seed", [1, 2])
def test_frequencies_are_the_softmax(seed: int) -> None:
    logits = np.linspace(-2, 2, 12).astype(np.float32)
    bits = np.random.PCG64(seed)

    class Random:
        def next_u32(self) -> int:
            return int(bits.random_raw()) >> 32

    num_draws = 20_000
    drawn = [MultinomialSampler().sample(logits, Random()) for _ in range(num_draws)]
    weights = np.exp(logits.astype(np.float64))
    result = scipy.stats.chisquare(np.bincount(drawn, minlength=12), num_draws * weights / weights.sum())
    assert result.pvalue > 1e-4


def run(params: SamplingParams, logits: Any, previous: Any = (), order: Order = "temperature_last") -> list[int]:
    """Ids that a pipeline leaves possible."""
    ctx = SamplingContext(0, params, np.array(logits, dtype=np.float32), previous, {}, len(logits))
    SamplingConfig.from_params(params, order=order).processor_chain.process(ctx)
    return [i for i, x in enumerate(ctx.logits) if x != -INF]


@pytest.mark.clause("SA-CONFIG-1", "SA-CONFIG-2")
@pytest.mark.parametrize(("temperature", "first"), [(2.0, [0, 1, 2, 3]), (0.5, [0, 1]), (1.0, [0, 1, 2])])
def test_the_order_of_temperature_and_nucleus(temperature: float, first: list[int]) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    assert run(params, [3, 2, 1, 0]) == [0, 1, 2]
    assert run(params, [3, 2, 1, 0], order="temperature_first") == first


@pytest.mark.clause("SA-CONFIG-1", "SA-CONFIG-2")
def test_the_order_of_all_processors() -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1, presence_penalty=0.5, min_p=0.1
    )
    heads, tails = ["repetition_penalty", "presence_frequency"], ["top_k", "top_p", "min_p"]
    names = SamplingConfig.from_params(params).processor_chain.processor_names()
    assert names == [*heads, *tails, "temperature"]
    first = SamplingConfig.from_params(params, order="temperature_first").processor_chain.processor_names()
    assert first == [*heads, "temperature", *tails]
    assert SamplingConfig.from_params(SamplingParams()).processor_chain.processor_names() == []
    with pytest.raises(InvalidParameterError, match="order"):
        SamplingConfig.from_params(params, order="random")  # type: ignore[arg-type]


@pytest.mark.clause("SA-CONFIG-3")
def test_penalties_apply_before_a_greedy_choice() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    ctx = SamplingContext(0, params, vector(2, 1.9), [0], {}, 2)
    assert SamplingConfig.from_params(params).sample(ctx, Draws()) == 1


@pytest.mark.clause("SA-CONFIG-4")
@pytest.mark.parametrize(
    "asked",
    [
        {"tfs": 0.9},
        {"typical_p": 0.5},
        {"mirostat": MirostatParams(2, 5.0, 0.1)},
        {"response_format": ResponseFormat.JsonObject},
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused_and_not_ignored(asked: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(asked))):
        SamplingConfig.from_params(dataclasses.replace(SamplingParams(), **asked))


@pytest.mark.clause("SA-BUILDER-1")
def test_a_builder_adds_only_what_does_something() -> None:
    builder = SamplingConfigBuilder.new()
    same = builder.with_temperature(1.0).with_top_k(0).with_top_p(1.0).with_top_p(2.0).with_repetition_penalty(1.0)
    assert same.build().processor_chain.processor_names() == []
    more = builder.with_top_p(0.5).with_top_k(3).with_temperature(0.5).with_repetition_penalty(1.2)
    assert more.build().processor_chain.processor_names() == ["repetition_penalty", "top_p", "top_k", "temperature"]
    assert builder.build().processor_chain.processor_names() == []
    for bad in (
        lambda: builder.with_top_p(0.0),
        lambda: builder.with_top_p(math.nan),
        lambda: builder.with_temperature(-1.0),
        lambda: builder.with_temperature(math.nan),
        lambda: builder.with_repetition_penalty(0.0),
        lambda: builder.with_top_k(-1),
    ):
        with pytest.raises(InvalidParameterError):
            bad()


@pytest.mark.clause("SA-BUILDER-2")
def test_the_sampler_of_a_builder() -> None:
    builder = SamplingConfigBuilder.new()
    assert builder.build().sampler.name() == "multinomial"
    assert builder.with_temperature(0.5).build().sampler.name() == "multinomial"
    for cold in (0.0, 9e-6):
        assert builder.with_temperature(cold).build().sampler.name() == "greedy"
        assert SamplingConfig.from_params(SamplingParams(temperature=cold)).sampler.name() == "greedy"
    explicit = builder.with_sampler(MultinomialSampler()).with_temperature(0.0)
    assert explicit.build().sampler.name() == "multinomial"
    assert builder.with_sampler(GreedySampler()).build().sampler.name() == "greedy"
