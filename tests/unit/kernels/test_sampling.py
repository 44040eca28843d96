"""argmax and sample_token."""

from __future__ import annotations

import math
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.kernels.sampling import argmax, kept_probabilities, sample_token, uniform_from_seed

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "rng_seed": 0}


def sample(logits, **changes):
    return sample_token(np.array(logits, np.float32), **{**NEUTRAL, **changes})


def support(logits, **changes):
    return {sample(logits, **{**changes, "rng_seed": seed}) for seed in range(400)}


def seed_of(mixed: int) -> int:
    """The seed that MurmurHash3's finaliser turns into `mixed`: its steps undone in reverse order."""
    h = mixed ^ (mixed >> 16)
    h = (h * pow(0xC2B2AE35, -1, 2**32)) & 0xFFFFFFFF
    h ^= (h >> 13) ^ (h >> 26)
    h = (h * pow(0x85EBCA6B, -1, 2**32)) & 0xFFFFFFFF
    return h ^ (h >> 16)


@pytest.mark.clause("KN-ARGMAX-1")
def test_the_first_maximum():
    assert argmax(np.array([1, 3, 3], np.float32)) == 1  # upstream: 2
    assert argmax(np.array([[1.0, np.inf, 3.0, np.inf]])) == 1
    assert argmax(np.array([-np.inf, -5.0, -np.inf], ml_dtypes.bfloat16)) == 1
    assert argmax(np.array([7.0], np.float16)) == 0


@pytest.mark.clause("KN-ARGMAX-1")
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_equals_python(values):
    if max(values) > -math.inf:
        assert argmax(np.array(values, np.float32)) == values.index(max(values))


@pytest.mark.clause("KN-ARGMAX-2", "KN-SAMPLE-8")
@pytest.mark.parametrize("logits", [[5.0, np.nan, 1.0], [np.nan], [np.inf, np.nan]])
def test_nan_is_an_error(logits):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        with pytest.raises(BackendError, match="NaN logits"):
            argmax(np.array(logits, dtype))
    with pytest.raises(BackendError, match="NaN logits"):
        sample(logits)


@pytest.mark.clause("KN-ARGMAX-2", "KN-SAMPLE-8")
def test_no_candidate_and_shapes():
    with pytest.raises(BackendError, match="No valid tokens"):
        argmax(np.full(3, -np.inf, np.float32))
    with pytest.raises(BackendError, match="No valid tokens"):
        sample([-np.inf, -np.inf])
    with pytest.raises(BackendError, match=r"\+inf at index 1"):
        sample([0, np.inf])
    for bad in (np.ones((2, 3)), np.ones(0), np.ones((1, 0)), np.ones((1, 1, 3)), np.ones(())):
        with pytest.raises(ShapeError, match="argmax: logits"):
            argmax(bad)
        with pytest.raises(ShapeError, match="sample_token: logits"):
            sample_token(bad, **NEUTRAL)
    with pytest.raises(BackendError, match="element type int64"):
        argmax(np.arange(3))


@pytest.mark.clause("KN-SAMPLE-1", "KN-SAMPLE-6")
def test_it_samples():
    # D-18: upstream returns 1 for every seed.
    logits = [math.log(1), math.log(3), -np.inf]
    drawn = Counter(sample([logits], rng_seed=seed) for seed in range(4000))
    assert set(drawn) == {0, 1}
    assert abs(drawn[1] - 3000) < 6 * math.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.clause("KN-SAMPLE-1", "KN-SAMPLE-3")
def test_temperature_comes_before_the_filters():
    # D-34: at T = 1 the two largest hold 0.88 of the mass, at T = 2 only 0.73: the third is needed to reach 0.8.
    logits = [3.0, 2.0, 1.0, 0.0]
    assert support(logits, top_p=0.8) == {0, 1}
    assert support(logits, top_p=0.8, temperature=2.0) == {0, 1, 2}


@pytest.mark.clause("KN-SAMPLE-2")
def test_the_penalty_is_applied_once_to_each_id():
    logits = [2.0, -1.0, 0.5]
    ids, counts = [0, 0, 1], [2, 2, 1]
    # D-02: once each gives [1, -2, 0.5]; upstream's chain [0.125, -2, 0.5] would choose id 2.
    options = {"repetition_penalty": 2.0, "repetition_token_ids": ids, "repetition_token_freqs": counts}
    assert sample(logits, temperature=0.0, **options) == 0
    expected = np.exp([1.0, -2.0, 0.5])
    drawn = Counter(sample(logits, rng_seed=seed, **options) for seed in range(6000))
    for token, p in enumerate(expected / expected.sum()):
        assert abs(drawn[token] - 6000 * p) < 6 * math.sqrt(6000 * p)
    options["repetition_token_freqs"] = [0, 0, 0]
    options["repetition_penalty"] = 1e6
    assert sample(logits, temperature=0.0, **options) == 0
    with pytest.raises(InvalidParameterError, match="3 repetition_token_ids with 1 "):
        sample(logits, **{**options, "repetition_token_freqs": [1]})
    for token in (-1, 3):
        with pytest.raises(InvalidParameterError, match="repetition_token_ids reach"):
            sample(logits, repetition_token_ids=[token], repetition_token_freqs=[1])


@pytest.mark.clause("KN-SAMPLE-3")
def test_temperature():
    assert support([1.0, 1.5, 1.5], temperature=0.0) == {1}
    assert support([1.0, 1.5, 1.4999], temperature=9e-6) == {1}
    assert support([0.0, 0.1], temperature=50.0) == {0, 1}


@pytest.mark.clause("KN-SAMPLE-4")
def test_top_k_keeps_ties():
    assert support([3, 1, 3, 2, 2], top_k=1) == {0, 2}
    assert support([3, 1, 3, 2, 2], top_k=3, temperature=3.0) == {0, 2, 3, 4}
    for k in (0, 5, 6):
        assert support([3, 1, 3, 2, 2], top_k=k, temperature=3.0) == {0, 1, 2, 3, 4}


@pytest.mark.clause("KN-SAMPLE-5")
def test_top_p():
    assert support([0, 0], top_p=0.5) == {0}  # D-33; upstream keeps both
    assert support([0, 0], top_p=0.5000001) == {0, 1}
    assert support([1, 5, 1], top_p=1e-9) == {1}
    assert support([2, 2, 2, 2], top_p=0.6) == {0, 1, 2}
    assert support([2, 2, 2, 2], top_p=2.0) == {0, 1, 2, 3}


@pytest.mark.clause("KN-SAMPLE-4", "KN-SAMPLE-5")
@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([0.1, 0.37, 0.7, 0.95, 1.0]),
)
def test_filters_against_their_definition(values, top_k, top_p):
    kept = kept_probabilities(np.array(values, np.float64), top_k, top_p) > 0
    floor = sorted(values, reverse=True)[top_k - 1] if 0 < top_k < len(values) else -math.inf
    mass = [math.exp(v) if v >= floor else 0.0 for v in values]
    order = sorted(range(len(values)), key=lambda i: (-mass[i], i))
    before = 0.0
    for rank, i in enumerate(order):
        share = before / math.fsum(mass)
        if abs(share - top_p) > 1e-12:
            assert kept[i] == (mass[i] > 0 and (rank == 0 or top_p >= 1 or share < top_p))
        before += mass[i]


@pytest.mark.clause("KN-SAMPLE-6")
def test_probability_zero_is_never_drawn():
    assert uniform_from_seed(0) == 0.0  # the draw that made upstream pick index 0 (D-10)
    assert sample([-np.inf, 0.0], rng_seed=0) == 1
    assert sample([0.0, -np.inf, 0.0], rng_seed=seed_of(2**31)) == 2  # the running sum must exceed a half
    largest = max(range(2**16), key=uniform_from_seed)
    assert sample([0.0, 0.0, -np.inf], rng_seed=largest) == 1


@pytest.mark.clause("KN-SAMPLE-7")
def test_seeds():
    # MurmurHash3's finaliser, values from its reference implementation.
    assert uniform_from_seed(seed_of(2**32 - 1)) == (2**32 - 1) / 2**32
    for seed, mixed in ((1, 0x514E28B7), (0xFFFFFFFF, 0x81F16F39), (0xDEADBEEF, 0x0DE5C6A9)):
        assert uniform_from_seed(seed) == mixed / 2**32
    u = np.sort([uniform_from_seed(seed) for seed in range(20000)])
    assert len(set(u)) == 20000
    assert u[0] >= 0
    assert u[-1] < 1
    # Kolmogorov-Smirnov at the 1e-6 level.
    assert np.abs(u - np.arange(20000) / 20000).max() < math.sqrt(-math.log(5e-7) / 2 / 20000)
    assert sample([0.0] * 8, rng_seed=1) == int(8 * 0x514E28B7 / 2**32)


@pytest.mark.clause("KN-SAMPLE-8")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, np.nan, np.inf]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, np.nan]),
        ("repetition_penalty", [0.0, -1.0, np.nan, np.inf]),
        ("rng_seed", [-1, 2**32]),
    ],
)
def test_parameters_outside_their_domain(name, values):
    for value in values:
        with pytest.raises(InvalidParameterError, match=f"{name} is"):
            sample([0.0, 1.0], **{name: value})
