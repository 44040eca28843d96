"""The bounds hold on inputs built to reach them, and they are not far from what is reached."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.parity.bounds.activation import gelu_erf_error, gelu_tanh_error, silu_error
from ferrum_ref.parity.bounds.attention import attention_errors
from ferrum_ref.parity.bounds.choice import admissible_maxima
from ferrum_ref.parity.bounds.dot import dot_error
from ferrum_ref.parity.bounds.elementwise import elementwise_error
from ferrum_ref.parity.bounds.norm import layer_norm_error, rms_norm_error
from ferrum_ref.parity.bounds.rope import rope_error
from ferrum_ref.parity.bounds.softmax import softmax_error
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import STORAGES
from ferrum_ref.types.algorithm import Algorithm

FP32, BF16 = STORAGES["fp32"], STORAGES["bf16"]
MODEL = ErrorModel(Algorithm(), FP32)
F32 = np.float32


def test_elementwise_is_gamma_of_the_terms() -> None:
    error = elementwise_error(MODEL, 2, np.array([3.0]))
    assert error[0] == pytest.approx(3.0 * 2 * 2.0**-24 / (1 - 2 * 2.0**-24), rel=2.0**-40)
    rounded = elementwise_error(ErrorModel(Algorithm(extra_roundings=1), BF16), 1, np.array([1.0]))
    assert rounded[0] > 2.0**-8


@pytest.mark.clause("PA-ELEMENTWISE-1")
@given(st.floats(-(2.0**20), 2.0**20, width=32), st.floats(-(2.0**20), 2.0**20, width=32))
def test_elementwise_holds_for_one_addition_and_one_product(a: float, b: float) -> None:
    for exact, got in ((a + b, F32(a) + F32(b)), (a * b, F32(a) * F32(b))):
        assert abs(float(got) - exact) <= elementwise_error(MODEL, 1, np.array([abs(exact)]))[0]


@pytest.mark.clause("PA-DOT-1", "PA-DOT-3", "PA-TIER-2")
def test_the_det_bound_of_a_sum_is_attained_and_the_sharp_one_is_not_for_such_input() -> None:
    """1 + t + t + ... with t just below half a unit in the last place: every addition loses all of t."""
    count = 1000
    terms = np.full((1, count), 2.0**-24 * (1 - 2.0**-20))
    terms[0, 0] = 1.0
    ones = np.ones((count, 1))
    exact = terms @ ones
    total = F32(0.0)
    for term in terms[0].astype(F32):
        total = F32(total + term)
    error = abs(float(total) - exact[0, 0])
    model = ErrorModel(Algorithm(inexact_products=False), FP32)
    bound = dot_error(model, terms, ones, exact)[0, 0]
    assert 0.99 * bound <= error <= bound
    assert error > dot_error(model.sharpened(1), terms, ones, exact)[0, 0]  # why structured input gets no sharp tier


@pytest.mark.clause("PA-DOT-2")
def test_the_sharp_bound_is_its_formula_and_never_above_det() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 2048)), rng.standard_normal((2048, 3))
    model = MODEL.sharpened(6)
    value = a @ b
    spread = np.sqrt(np.square(a) @ np.square(b))
    wanted = model.confidence(2048.0) * 2.0**-24 * np.sqrt(2048.0) * (spread + np.abs(value))
    np.testing.assert_array_less(np.abs(dot_error(model, a, b, value) / wanted - 1.0), 2.0**-40)
    assert np.all(dot_error(model, a, b, value) < 0.2 * dot_error(MODEL, a, b, value))
    few = (a[:, :3], b[:3])
    assert np.all(dot_error(model, *few, few[0] @ few[1]) <= dot_error(MODEL, *few, few[0] @ few[1]))


@pytest.mark.clause("PA-DOT-1")
def test_tf32_and_coarse_accumulators_widen_the_bound() -> None:
    a, b = np.ones((1, 300)), np.ones((300, 1))
    plain = dot_error(MODEL, a, b, a @ b)[0, 0]
    tf32 = dot_error(ErrorModel(Algorithm(accumulate="tf32"), FP32), a, b, a @ b)[0, 0]
    assert tf32 >= plain + 2 * 2.0**-11 * 300
    assert dot_error(ErrorModel(Algorithm(accumulate="bf16"), BF16), a, b, a @ b)[0, 0] == np.inf
    tree = dot_error(ErrorModel(Algorithm(reduction="tree", reduction_depth=9), FP32), a, b, a @ b)[0, 0]
    assert tree < plain / 20
    assert dot_error(MODEL, np.zeros((2, 0)), np.zeros((0, 3)), np.zeros((2, 3))).max() == 0.0


@pytest.mark.clause("PA-RMSNORM-1", "PA-RMSNORM-2")
def test_the_rms_norm_bound_shrinks_where_eps_decides() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, 4096))
    relative = [
        (rms_norm_error(MODEL, scale * x, 1e-5, np.ones_like(x)) / 2.0**-24).max() for scale in (1.0, 1e-3, 1e-6)
    ]
    assert relative[0] > 2000 > relative[1] > relative[2]
    assert relative[2] < 10
    rough = rms_norm_error(MODEL, x, 1e-5, np.ones_like(x), input_error=2.0**-8)
    assert rough.min() > 2 * 2.0**-8 * 0.99
    assert rms_norm_error(MODEL, np.zeros((2, 0)), 1e-5, np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.clause("PA-LAYERNORM-1")
def test_layer_norm_of_shifted_data_keeps_two_passes_and_rejects_the_one_pass_formula() -> None:
    rng = np.random.default_rng(3)
    x = (1000.0 + rng.standard_normal((4, 16))).astype(F32)
    wide = x.astype(np.float64)
    weight = np.ones(16)
    mean = wide.mean(axis=-1, keepdims=True)
    exact = (wide - mean) / np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-5)
    bound = layer_norm_error(MODEL, wide, weight, 1e-5, exact)
    centre = x.mean(axis=-1, keepdims=True, dtype=F32)
    two_pass = (x - centre) / np.sqrt(((x - centre) ** 2).mean(axis=-1, keepdims=True, dtype=F32) + F32(1e-5))
    spread = (x * x).mean(axis=-1, keepdims=True, dtype=F32) - centre * centre
    one_pass = (x - centre) / np.sqrt(np.maximum(spread, F32(0.0)) + F32(1e-5))
    assert np.all(np.abs(two_pass - exact) <= bound)
    assert np.any(np.abs(one_pass - exact) > bound)


@pytest.mark.clause("PA-ROPE-1")
def test_rope_is_gamma_two_of_its_terms() -> None:
    c, s = np.array([[0.6]]), np.array([[0.8]])
    error = rope_error(MODEL, np.array([[2.0]]), np.array([[-1.0]]), c, s)
    unit = 2 * 2.0**-24 / (1 - 2 * 2.0**-24)
    np.testing.assert_array_less(np.abs(error / (unit * np.array([[2 * 0.6 + 0.8, 0.6 + 2 * 0.8]])) - 1), 2.0**-40)


@pytest.mark.clause("PA-SOFTMAX-1")
@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=12), st.integers(0, 2**31))
def test_softmax_holds_for_any_error_within_the_claims(logits: list[float], seed: int) -> None:
    """Every exponential and the sum are moved to an end of their intervals: the result stays within e."""
    rng = np.random.default_rng(seed)
    x = np.array([logits])
    shifted = x - x.max()
    exact = np.exp(shifted) / np.exp(shifted).sum()
    unit, tau = 2.0**-24, 2 * 3.0 * 2.0**-24
    signs = rng.choice([-1.0, 1.0], (3, x.size))
    moved = np.exp(shifted * (1 + signs[0] * unit)) * (1 + signs[1] * tau)
    total = moved.sum() * (1 + signs[2, 0] * unit * (x.size - 1))
    error = np.abs(moved / total * (1 + unit * signs[2, -1]) - exact)
    assert np.all(error <= softmax_error(MODEL, x, exact))


def test_softmax_ignores_masked_entries_and_empty_lanes() -> None:
    x = np.array([[0.0, -np.inf], [-np.inf, -np.inf]])
    value = np.array([[1.0, 0.0], [np.nan, np.nan]])
    error = softmax_error(MODEL, x, value)
    assert error[0, 1] == 2 * MODEL.flush
    assert np.isfinite(error).all()
    assert softmax_error(MODEL, np.zeros((3, 0)), np.zeros((3, 0))).shape == (3, 0)


def attention_inputs(num_keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_keys)
    return rng.standard_normal((2, 8)), rng.standard_normal((num_keys, 8)), rng.standard_normal((num_keys, 8))


@pytest.mark.clause("PA-ATTENTION-1")
def test_attention_cancels_a_common_error_and_one_visible_key_returns_its_value() -> None:
    q, k, v = attention_inputs(5)
    visible = np.zeros((2, 5), dtype=bool)
    visible[0, 3] = True
    value, (error,) = attention_errors([MODEL], q, k, v, 0.5, visible)
    np.testing.assert_array_equal(value[0], v[3])
    np.testing.assert_array_less(error[0], 6 * 2.0**-24 * np.abs(v[3]))  # no score matters
    assert not value[1].any()
    assert not error[1].any()
    equal = np.broadcast_to(v[:1], v.shape)
    _, (same,) = attention_errors([MODEL], 30 * q, k, equal, 0.5, np.ones((2, 5), dtype=bool))
    np.testing.assert_array_less(same, 20 * 2.0**-24 * np.abs(equal[:2]))  # equal values: no weight matters


@pytest.mark.clause("PA-ATTENTION-1")
@given(st.integers(0, 2**31), st.floats(0.1, 20.0))
def test_attention_holds_for_any_error_within_the_claims(seed: int, size: float) -> None:
    """Scores and exponentials moved to an end of their intervals: the result stays within e."""
    rng = np.random.default_rng(seed)
    q, k, v = size * rng.standard_normal((1, 4)), rng.standard_normal((7, 4)), rng.standard_normal((7, 4))
    scores = 0.5 * q @ k.T
    weights = np.exp(scores - scores.max())
    exact = weights @ v / weights.sum()
    unit = 2.0**-24
    score_error = 0.5 * 5 * unit * np.abs(q) @ np.abs(k).T + 2 * unit * np.abs(scores)
    signs = rng.choice([-1.0, 1.0], (2, 7))
    moved_scores = scores + signs[0] * score_error
    moved = np.exp((moved_scores - scores.max()) * (1 + unit * signs[1])) * (1 + 6 * unit * signs[0])
    value, (error,) = attention_errors([MODEL], q, k, v, 0.5, np.ones((1, 7), dtype=bool))
    assert np.all(np.abs(moved @ v / moved.sum() - exact) <= error)
    assert np.abs(value - exact).max() < 1000 * 2.0**-53 * np.abs(v).max()


@pytest.mark.clause("PA-ATTENTION-2", "PA-ATTENTION-3")
def test_declared_blocks_and_roundings_widen_the_bound_by_their_terms() -> None:
    q, k, v = attention_inputs(40)
    visible = np.ones((2, 40), dtype=bool)
    declared = [
        Algorithm(),
        Algorithm(key_block=16),
        Algorithm(rounds_probabilities=True),
        Algorithm(rounds_scores=True),
    ]
    _, (plain, blocks, probabilities, scores) = attention_errors(
        [ErrorModel(one, BF16) for one in declared], q, k, v, 8**-0.5, visible
    )
    weights = np.exp(8**-0.5 * q @ k.T)
    magnitude = weights @ np.abs(v) / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_array_less(np.abs((blocks - plain) / (3 * 9 * 2.0**-24 * magnitude) - 1), 2.0**-20)
    np.testing.assert_array_less(np.abs((probabilities - plain) / (2.0**-8 * magnitude) - 1), 2.0**-20)
    assert np.all(scores > plain)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = attention_inputs(23)
    visible = np.tril(np.ones((2, 23), dtype=bool), 20)
    whole_value, (whole,) = attention_errors([MODEL], q, k, v, 0.3, visible)
    monkeypatch.setattr("ferrum_ref.parity.bounds.attention.CHUNK_ELEMENTS", 1)
    value, (error,) = attention_errors([MODEL], q, k, v, 0.3, visible)
    np.testing.assert_array_less(np.abs(value - whole_value), 2.0**-48)
    np.testing.assert_array_less(np.abs(error / whole - 1), 2.0**-40)


@pytest.mark.clause("PA-SILU-1", "PA-GELU-1", "PA-GELU-2")
@given(st.floats(-100, 100), st.sampled_from([-1.0, 1.0]), st.sampled_from([-1.0, 1.0]))
def test_activations_hold_for_any_error_within_the_claims(x: float, first: float, second: float) -> None:
    """The function in the middle is moved to an end of its claim, the last rounding too."""
    unit = 2.0**-24
    one = np.array([x])
    silu = one * scipy.special.expit(one)
    moved = one / (1 + np.exp(-one) * (1 + first * 6 * unit)) * (1 + second * 3 * unit)
    assert np.abs(moved - silu)[0] <= silu_error(MODEL, one, 1.0, silu)[0]
    gelu = one * scipy.special.ndtr(one)
    erf = scipy.special.erf(one / np.sqrt(2.0) * (1 + second * unit)) * (1 + first * 8 * unit)
    assert np.abs(0.5 * one * (1 + erf) - gelu)[0] <= gelu_erf_error(MODEL, one, gelu)[0] + 2.0**-50 * abs(x)
    inner = np.sqrt(2 / np.pi) * (one + 0.044715 * one**3)
    exact = 0.5 * one * (1 + np.tanh(inner))
    tanh = np.tanh(inner * (1 + second * 3 * unit)) * (1 + first * 8 * unit)
    assert np.abs(0.5 * one * (1 + tanh) - exact)[0] <= gelu_tanh_error(MODEL, one, exact)[0] + 2.0**-50 * abs(x)


@pytest.mark.clause("PA-ARGMAX-1")
def test_argmax_admits_the_first_maximum_or_whatever_errors_can_reach() -> None:
    logits = np.array([1.0, 3.0, 2.9, 3.0, -np.inf])
    assert admissible_maxima(logits).tolist() == [1]
    assert admissible_maxima(logits, 0.06).tolist() == [1, 2, 3]
    assert admissible_maxima(logits, 0.01).tolist() == [1, 3]
    assert admissible_maxima(np.full(3, -np.inf)).tolist() == [0]
