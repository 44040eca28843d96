"""Units of roundoff, and how they grow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.operation import Case, Inputs
from ferrum_ref.parity.units import STORAGES, Storage, confidence_factor, gamma, gamma_probabilistic, storage_named
from ferrum_ref.parity.verdict import judge
from ferrum_ref.types.algorithm import Algorithm

SIXTEEN_BITS = [STORAGES["fp16"], STORAGES["bf16"]]


def finite_values(storage: Storage) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        values = np.arange(2**16, dtype=np.uint16).view(storage.numpy_dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.clause("PA-UNIT-1")
@pytest.mark.parametrize("storage", SIXTEEN_BITS, ids=lambda storage: storage.name)
def test_the_worst_rounding_of_every_16_bit_number_is_the_unit_or_eta(storage: Storage) -> None:
    """Exhaustive: between any two neighbours the middle is farthest from both."""
    values = finite_values(storage)
    middles, errors = (values[1:] + values[:-1]) / 2, np.diff(values) / 2
    assert np.all(errors <= np.maximum(storage.unit * np.abs(middles), storage.eta))
    normal = np.abs(middles) >= storage.smallest_normal
    relative = (errors[normal] / np.abs(middles[normal])).max()
    assert storage.unit / (1 + 2 * storage.unit) <= relative <= storage.unit  # attained right above a power of two
    assert errors[~normal].max() == storage.eta
    assert values.max() == storage.largest
    np.testing.assert_array_equal(storage.round(values).astype(np.float64), values)


@pytest.mark.clause("PA-UNIT-1")
def test_float32_is_what_numpy_says() -> None:
    info, storage = np.finfo(np.float32), STORAGES["fp32"]
    assert storage.unit == info.eps / 2
    assert storage.eta == float(info.smallest_subnormal) / 2
    assert (storage.smallest_normal, storage.largest) == (float(info.smallest_normal), float(info.max))
    with pytest.raises(InvalidParameterError, match="fp8"):
        storage_named("fp8")


@pytest.mark.clause("PA-UNIT-2")
@given(st.integers(0, 4000), st.sampled_from([2.0**-24, 2.0**-11, 2.0**-8]))
def test_gamma_bounds_the_product_of_n_roundings_and_gives_up_when_it_must(n: int, unit: float) -> None:
    bound = float(gamma(n, unit))
    if n * unit >= 1:
        assert bound == math.inf
    else:
        assert bound >= (1 + unit) ** n - 1 - n * 2.0**-52
        assert bound >= 1 - (1 - unit) ** n


@pytest.mark.clause("PA-UNIT-3")
def test_gamma_probabilistic_is_its_formula_and_never_above_gamma() -> None:
    unit, count, outputs = 2.0**-24, 4096, 1000
    factor = math.sqrt(2 * math.log(2 * count * outputs / 1e-9))
    assert confidence_factor(count, outputs) == factor
    wanted = math.exp(factor * math.sqrt(count) * unit + count * unit**2 / (1 - unit)) - 1
    assert float(gamma_probabilistic(count, unit, outputs)) == pytest.approx(wanted, rel=2.0**-24)  # exp - 1 cancels
    counts = np.arange(0, 5000, 7)
    assert np.all(gamma_probabilistic(counts, unit, outputs) <= gamma(counts, unit))
    assert float(gamma_probabilistic(10, unit, 1)) == float(gamma(10, unit))  # so few: the sure bound is smaller


@pytest.mark.clause("PA-UNIT-3")
def test_random_roundings_stay_within_gamma_probabilistic() -> None:
    rng = np.random.default_rng(0)
    unit, count = 2.0**-11, 400
    products = np.prod(1.0 + rng.uniform(-unit, unit, (2000, count)), axis=1) - 1.0
    assert np.abs(products).max() <= float(gamma_probabilistic(count, unit, 2000))
    assert float(gamma_probabilistic(count, unit, 2000)) < 0.5 * float(gamma(count, unit))


@pytest.mark.clause("PA-DOT-1", "PA-TIER-1")
def test_what_a_declaration_changes_in_the_number_of_roundings() -> None:
    fp16, fp32 = STORAGES["fp16"], STORAGES["fp32"]
    assert float(ErrorModel(Algorithm(), fp16).dot_roundings(10)) == 9  # products of 16-bit numbers are exact
    assert float(ErrorModel(Algorithm(), fp32).dot_roundings(10)) == 10
    fused = ErrorModel(Algorithm(inexact_products=False), fp32)  # the first product is rounded when it meets zero
    assert float(fused.dot_roundings(10)) == 10
    assert float(fused.dot_roundings(1)) == 1
    assert float(ErrorModel(Algorithm(accumulate="fp64"), fp32).dot_roundings(10)) == 9
    tree = Algorithm(reduction="tree", reduction_depth=4)
    assert float(ErrorModel(tree, fp16).dot_roundings(1000)) == 4
    assert float(ErrorModel(tree, fp16).dot_roundings(3)) == 2
    assert float(ErrorModel(Algorithm(), fp16).dot_roundings(0)) == 0
    assert ErrorModel(Algorithm(accumulate="tf32"), fp16).factor_unit == 0.0
    assert ErrorModel(Algorithm(accumulate="tf32"), fp32).factor_unit == 2.0**-11


@pytest.mark.clause("PA-STORE-1")
def test_the_stored_bound_is_its_formula() -> None:
    storage = STORAGES["bf16"]
    model = ErrorModel(Algorithm(), storage)
    bound = model.stored(np.array([0.5]), np.array([-3.0]))
    assert bound[0] == (1 + 2.0**-8) * 0.5 + 2.0**-8 * 3.0 + storage.eta
    flushed = ErrorModel(Algorithm(flushes_subnormals=True), storage)
    assert flushed.stored(np.array([0.0]), np.array([0.0]))[0] == storage.smallest_normal
    assert flushed.underflow > model.underflow


@pytest.mark.clause("PA-STORE-2")
@pytest.mark.parametrize(
    ("accumulate", "dtype", "rounds"),
    [
        ("fp32", "fp32", False),
        ("tf32", "fp32", False),
        ("fp64", "fp32", True),
        ("fp32", "fp16", True),
        ("fp16", "fp16", False),
        ("fp16", "bf16", True),
        ("bf16", "fp32", False),
    ],
)
def test_a_store_that_loses_nothing_is_not_counted_twice(accumulate: str, dtype: str, rounds: bool) -> None:
    storage = STORAGES[dtype]
    model = ErrorModel(Algorithm(accumulate=accumulate), storage)
    assert model.store == ((storage.unit, storage.eta) if rounds else (0.0, 0.0))
    assert model.stored(np.array([0.25]), np.array([1.0]))[0] > 0.25 or not rounds


@pytest.mark.clause("PA-STORE-2")
def test_bf16_sums_in_fp16_tensors_lose_what_lies_below_the_range_of_fp16() -> None:
    assert ErrorModel(Algorithm(accumulate="bf16"), STORAGES["fp16"]).store == (0.0, STORAGES["fp16"].eta)


@pytest.mark.clause("PA-STORE-2")
def test_one_more_rounding_shows_in_float32_too() -> None:
    """a (1 / b) rounds twice where a / b rounds once."""
    division, rng = operation_named("div"), np.random.default_rng(0)
    a, b = (rng.standard_normal((64, 64)).astype(np.float32) for _ in "ab")
    inputs = Inputs(Case("iid", {"a": (64, 64), "b": (64, 64)}), STORAGES["fp32"], {"a": a, "b": b})
    (expected,) = division.expect(inputs, Algorithm())
    assert judge(expected, a / b).passed
    assert not judge(expected, a * (np.float32(1.0) / b)).passed
