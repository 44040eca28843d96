"""Parameters that no file stores: each strategy against its distribution in closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ferrum_ref.builder.initialization import decode_strategy, encode_strategy, initial_values
from ferrum_ref.errors import ConfigError, NotFoundError
from ferrum_ref.interfaces.model_builder import InitializationStrategy

SHAPE = (50, 80)


def drawn(strategy: Any, name: str = "w", shape: tuple[int, ...] = SHAPE, seed: int = 0, **rules: Any) -> Any:
    return initial_values(strategy, name, shape, seed, rules)


@pytest.mark.clause("MB-INIT-1", "MB-INIT-2")
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (InitializationStrategy.Uniform(-2.0, 3.0), stats.uniform(-2, 5)),
        (InitializationStrategy.Normal(1.0, 0.5), stats.norm(1, 0.5)),
        (InitializationStrategy.Xavier, stats.uniform(-math.sqrt(6 / 130), 2 * math.sqrt(6 / 130))),
        (InitializationStrategy.Kaiming, stats.uniform(-math.sqrt(6 / 80), 2 * math.sqrt(6 / 80))),
    ],
)
def test_distributions(strategy: Any, expected: Any) -> None:
    """Kolmogorov-Smirnov on 4000 draws; seeds are fixed, so the verdict repeats."""
    for seed in range(5):
        values = drawn(strategy, seed=seed)
        assert values.dtype == np.float32
        assert values.shape == SHAPE
        assert stats.kstest(values.ravel(), expected.cdf).pvalue > 1e-4


@pytest.mark.clause("MB-INIT-1")
def test_constants() -> None:
    assert not drawn(InitializationStrategy.Zeros).any()
    assert (drawn(InitializationStrategy.Ones) == 1).all()
    assert (drawn(InitializationStrategy.Normal(3.0, 0.0)) == 3).all()
    assert (drawn(InitializationStrategy.Uniform(2.0, 2.0)) == 2).all()
    assert drawn(InitializationStrategy.Ones, shape=(0, 4)).shape == (0, 4)


@pytest.mark.clause("MB-INIT-1")
def test_the_open_end_stays_open() -> None:
    """Between 1 and the next float32 there is nothing: every draw rounds down to 1."""
    high = float(np.nextafter(np.float32(1), np.float32(2)))
    assert (drawn(InitializationStrategy.Uniform(1.0, high)) == 1).all()


@pytest.mark.clause("MB-INIT-1", "MB-INIT-2")
@pytest.mark.parametrize(
    ("strategy", "shape"),
    [
        (InitializationStrategy.Uniform(1.0, 0.0), SHAPE),
        (InitializationStrategy.Uniform(0.0, math.inf), SHAPE),
        (InitializationStrategy.Normal(0.0, -1.0), SHAPE),
        (InitializationStrategy.Normal(math.nan, 1.0), SHAPE),
        (InitializationStrategy.Xavier, (8,)),
        (InitializationStrategy.Kaiming, ()),
        (InitializationStrategy.Kaiming, (8, 0)),
    ],
)
def test_what_cannot_be(strategy: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="initialise 'w'"):
        drawn(strategy, shape=shape)


@pytest.mark.clause("MB-INIT-3")
def test_rules_by_name() -> None:
    rule = InitializationStrategy.Custom("ramp")

    def ramp(shape: Any, rng: np.random.Generator) -> Any:
        return np.arange(math.prod(shape)).reshape(shape)

    np.testing.assert_array_equal(drawn(rule, shape=(2, 2), ramp=ramp), [[0, 1], [2, 3]])
    with pytest.raises(NotFoundError, match="'ramp'"):
        drawn(rule)
    with pytest.raises(ConfigError, match=r"gave shape \(3,\)"):
        drawn(rule, ramp=lambda shape, rng: np.zeros(3))
    first = drawn(rule, ramp=lambda shape, rng: rng.random(shape))
    np.testing.assert_array_equal(first, drawn(rule, ramp=lambda shape, rng: rng.random(shape)))


@pytest.mark.clause("MB-INIT-4")
def test_numbers_depend_on_seed_and_name_alone() -> None:
    strategy = InitializationStrategy.Normal(0.0, 1.0)
    first = drawn(strategy, "a")
    drawn(strategy, "b")
    np.testing.assert_array_equal(drawn(strategy, "a"), first)
    for other in (drawn(strategy, "b"), drawn(strategy, "a", seed=1)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1


def single(strategy: Any) -> list[Any]:
    """A strategy's type and fields, numbers as float32: what its JSON holds."""
    fields = dataclasses.astuple(strategy)
    return [type(strategy).__name__, *(np.float32(each) if isinstance(each, float) else each for each in fields)]


@pytest.mark.clause("MB-DATA-4")
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(0, 1e9, width=32), st.text())
def test_strategies_as_json(low: float, std: float, rule: str) -> None:
    tagged = [
        (InitializationStrategy.Zeros, "Zeros"),
        (InitializationStrategy.Kaiming, "Kaiming"),
        (InitializationStrategy.Uniform(low, std), {"Uniform": {"min": low, "max": std}}),
        (InitializationStrategy.Normal(low, std), {"Normal": {"mean": low, "std": std}}),
        (InitializationStrategy.Custom(rule), {"Custom": rule}),
    ]
    for strategy, json in tagged:
        assert single(decode_strategy(json)) == single(strategy)
        again = decode_strategy(encode_strategy(strategy))
        assert single(again) == single(strategy)
    for wrong in ("Moon", {"Uniform": {}}, {"Uniform": {"min": 1}}, None, 3, {"Custom": 4}, {"a": 1, "b": 2}):
        with pytest.raises(ConfigError):
            decode_strategy(wrong)
