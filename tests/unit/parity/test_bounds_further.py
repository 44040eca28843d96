"""Bounds of soft caps, sinks, packed weights and quotients: they hold on inputs built to reach them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.parity.bounds.attention import attention_errors
from ferrum_ref.parity.bounds.elementwise import quotient_error
from ferrum_ref.parity.bounds.norm import rms_norm_error
from ferrum_ref.parity.bounds.quantized import quantized_linear_error
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.honest.linear import parts_of
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.runner import draw_case
from ferrum_ref.parity.units import STORAGES
from ferrum_ref.types.algorithm import Algorithm

FP32 = STORAGES["fp32"]
MODEL = ErrorModel(Algorithm(), FP32)
UNIT = 2.0**-24
F32 = np.float32


@pytest.mark.clause("PA-ATTENTION-4", "PA-ATTENTION-5")
@given(st.integers(0, 2**31), st.floats(0.1, 20.0), st.sampled_from([0.0, 3.0, 30.0]), st.booleans())
def test_caps_and_sinks_hold_for_any_error_within_the_claims(seed: int, size: float, cap: float, sink: bool) -> None:
    """Scores, tanh and exponentials moved to an end of their intervals: the result stays within e."""
    rng = np.random.default_rng(seed)
    q, k, v = size * rng.standard_normal((1, 4)), rng.standard_normal((7, 4)), rng.standard_normal((7, 4))
    sinks = rng.standard_normal(1) if sink else None
    scaled = 0.5 * q @ k.T

    def mixed(scores: np.ndarray, relative: np.ndarray | float) -> np.ndarray:
        top = max(scores.max(), -np.inf if sinks is None else sinks[0])
        weights = np.exp(scores - top) * (1.0 + relative)
        beside = 0.0 if sinks is None else np.exp(sinks[0] - top) * (1.0 - 6 * UNIT * np.sign(relative).flat[0])
        return weights @ v / (weights.sum() + beside)

    def capped(scores: np.ndarray) -> np.ndarray:
        return cap * np.tanh(scores / cap) if cap else scores

    signs = rng.choice([-1.0, 1.0], (3, 7))
    own = 0.5 * 5 * UNIT * np.abs(q) @ np.abs(k).T + 2 * UNIT * np.abs(scaled)
    moved = capped(scaled + signs[0] * own) * (1.0 + (9 * UNIT * signs[1] if cap else 0.0))
    value, (error,) = attention_errors([MODEL], q, k, v, 0.5, np.ones((1, 7), dtype=bool), cap, sinks)
    assert np.abs(value - mixed(capped(scaled), np.zeros((1, 7)))).max() < 1e-12 * np.abs(v).max()
    assert np.all(np.abs(mixed(moved, 6 * UNIT * signs[2:]) - value) <= error)


@pytest.mark.clause("PA-ATTENTION-4")
def test_a_saturated_cap_forgives_the_error_of_the_score() -> None:
    rng = np.random.default_rng(3)
    q, k, v = 400 * np.ones((1, 8)), 1.0 + 0.1 * rng.random((5, 8)), rng.standard_normal((5, 8))
    visible = np.ones((1, 5), dtype=bool)
    _, (plain,) = attention_errors([MODEL], q, k, v, 1.0, visible)
    _, (capped,) = attention_errors([MODEL], q, k, v, 1.0, visible, 5.0)
    assert np.all(capped < 0.1 * plain)


@pytest.mark.clause("PA-ATTENTION-5")
def test_a_sink_takes_its_share_and_a_row_without_keys_stays_zero() -> None:
    q, k, v = np.zeros((2, 4)), np.zeros((3, 4)), np.ones((3, 4))
    visible = np.array([[True, True, True], [False, False, False]])
    value, (error,) = attention_errors([MODEL], q, k, v, 1.0, visible, 0.0, np.zeros(2))
    np.testing.assert_allclose(value[0], 0.75, rtol=1e-15)
    assert not value[1].any()
    assert not error[1].any()
    moved = 3 * 0.25 * 0.25 * 6 + 0.25 * 0.75 * 6  # four weights of 1/4 err by 6u; three lie 1/4 off o, the sink 3/4
    np.testing.assert_allclose(error[0], (moved + (2 * 4 + 1 + 1) * 0.75) * UNIT, rtol=1e-5)


@pytest.mark.clause("PA-QLINEAR-1")
def test_the_bound_of_packed_weights_is_its_formula_and_attained() -> None:
    """1 and then terms of just under half a unit in the last place: a running sum loses them all."""
    operation = operation_named("quantized_linear_q8_0")
    index = next(index for index, one in enumerate(operation.cases) if one.probe == "lost terms")
    inputs = draw_case(operation, FP32, index, 0)
    (expected,) = operation.expect(inputs, Algorithm())
    num_terms = inputs.arrays["x"].shape[1]
    total = F32(0.0)
    for term in inputs.arrays["x"][0]:
        total = F32(total + term)
    bound = float(np.asarray(expected.det)[0, 0])
    assert 0.97 < abs(float(total) - expected.value[0, 0]) / bound < 1.0
    x, weight = inputs.exact("x"), np.ones((3, num_terms))
    error = quantized_linear_error(MODEL, x, weight, np.ones((3, 8)), 0.0, x @ weight.T)
    gamma = (num_terms + 1) * UNIT / (1 - (num_terms + 1) * UNIT)
    np.testing.assert_allclose(error, gamma * (x @ weight.T), rtol=1e-12)
    half = ErrorModel(Algorithm(), STORAGES["fp16"])  # d q has more bits than fp16: its product with x is not exact
    np.testing.assert_allclose(
        quantized_linear_error(half, x, weight, np.ones((3, 8)), 0.0, x @ weight.T), gamma * (x @ weight.T), rtol=1e-12
    )


@pytest.mark.clause("PA-QLINEAR-2")
def test_declared_folding_and_rounding_of_activations_widen_the_bound_by_their_terms() -> None:
    rng = np.random.default_rng(4)
    x, quanta = rng.standard_normal((2, 64)), rng.integers(-8, 8, (3, 64)).astype(float)
    scales = np.full((3, 2), 0.25)
    weight = 0.25 * quanta
    value = x @ weight.T
    plain, folded, rounded = (
        quantized_linear_error(ErrorModel(one, FP32), x, weight, scales, 8.0, value)
        for one in (Algorithm(), Algorithm(folds_zero_point=True), Algorithm(quantizes_activations=True))
    )
    gamma = 65 * UNIT / (1 - 65 * UNIT)
    np.testing.assert_allclose(folded - plain, gamma * (np.abs(x) @ np.full((3, 64), 4.0).T), rtol=1e-9)
    largest = np.repeat(np.abs(x).reshape(2, 2, 32).max(axis=-1), 32, axis=-1)
    np.testing.assert_allclose(rounded - plain, largest / 254 @ np.abs(weight).T, rtol=1e-5)


@pytest.mark.clause("PA-QLINEAR-2")
@given(st.integers(0, 2**31))
def test_eight_bit_activations_stay_within_their_declared_bound(seed: int) -> None:
    operation = operation_named("quantized_linear_q4_0")
    inputs = draw_case(operation, FP32, 1, seed)
    (expected,) = operation.expect(inputs, Algorithm(quantizes_activations=True))
    x = inputs.arrays["x"]
    blocks = x.reshape(2, -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / F32(127)
    rounded = (np.rint(blocks / step) * step).reshape(x.shape)
    scales, codes = parts_of(inputs.arrays["packed"], "Q4_0")
    weight = (scales[..., None] * (codes - 8)).reshape(33, 128)
    assert np.all(np.abs(rounded @ weight.T - expected.value) <= np.asarray(expected.det))


@pytest.mark.clause("PA-RMSNORM-1")
def test_the_rms_norm_bound_is_its_formula() -> None:
    """16 ones and eps = 1: m / (m + eps) is one half."""
    value = np.full((1, 16), 0.5**0.5)
    gamma = 16 * UNIT / (1 - 16 * UNIT)
    t = (gamma + 2 * UNIT) * 0.5 + 2 * UNIT
    wanted = value * ((1 - t) ** -0.5 - 1 + 2 * 2.0 * UNIT + 2 * UNIT)
    np.testing.assert_allclose(rms_norm_error(MODEL, np.ones((1, 16)), 1.0, value), wanted, rtol=1e-8)


@pytest.mark.clause("PA-QUOTIENT-1")
@given(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(2.0**-40, 2.0**40, width=32))
def test_a_quotient_errs_by_its_claim(a: float, b: float) -> None:
    exact = np.array([a / b])
    with np.errstate(all="ignore"):
        got = float(F32(a) / F32(b))
    if np.isfinite(got):
        assert abs(got - exact[0]) <= quotient_error(MODEL, exact)[0]
    sloppy = quotient_error(ErrorModel(Algorithm(div_ulp=2.0), FP32), np.array([1.0]))
    assert sloppy[0] == pytest.approx(4 * UNIT, rel=1e-6)


@pytest.mark.clause("PA-DOT-4")
def test_declared_partial_sums_meet_fewer_additions() -> None:
    """ceil(n / p) - 1 within one, p - 1 where they are joined, never more than n - 1."""
    for parts, terms, additions in ((1, 100, 99), (16, 256, 15 + 15), (16, 250, 15 + 15), (16, 17, 16), (4, 3, 2)):
        assert ErrorModel(Algorithm(partial_sums=parts), FP32).additions(terms) == additions


@pytest.mark.clause("PA-DOT-4")
@pytest.mark.parametrize("backend", ["numba-cpu"])
def test_a_kernel_in_vector_lanes_is_tight_once_it_declares_them(backend: str) -> None:
    """Sixteen running sums or more: without the declaration its fp32 cell lies below the floor of 0.05."""
    pytest.importorskip("numba")
    from ferrum_numba.cpu.lanes import LANES

    from ferrum_ref.parity.ops.catalogue import operation_named
    from ferrum_ref.parity.tightness import is_tight
    from ferrum_ref.plugins import load_backend

    operation, chosen = operation_named("quantized_linear_q4_0"), load_backend(backend)
    index = next(place for place, case in enumerate(operation.cases) if case.probe == "lost terms")
    inputs = draw_case(operation, FP32, index, 0)
    (got,) = operation.call(chosen, inputs)
    ratios = []
    for parts in (1, 2 * LANES):
        (expected,) = operation.expect(inputs, Algorithm(partial_sums=parts))
        ratios.append(float(np.max(np.abs(got - expected.value) / expected.det)))
    assert not is_tight(operation.name, "fp32", ratios[0])
    assert is_tight(operation.name, "fp32", ratios[1])
