"""Rotary embedding and its tables."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.rope import rope_frequencies, rope_tables, rotary_embedding

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def rotated(x, cos, sin, positions):
    """The equation, element by element, in float64; and the sum of the magnitudes of its two terms."""
    y, magnitude = np.zeros(x.shape), np.zeros(x.shape)
    half = x.shape[-1] // 2
    for b, t, h, i in np.ndindex(*x.shape[:3], half):
        p, first, second = positions[t], float(x[b, t, h, i]), float(x[b, t, h, i + half])
        c, s = float(cos[p, i]), float(sin[p, i])
        y[b, t, h, i], y[b, t, h, i + half] = first * c - second * s, second * c + first * s
        magnitude[b, t, h, i] = abs(first * c) + abs(second * s)
        magnitude[b, t, h, i + half] = abs(second * c) + abs(first * s)
    return y, magnitude


@pytest.mark.clause("KN-ROPE-1")
def test_closed_form():
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    y = rotary_embedding(x, np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), [0])
    assert y.reshape(-1).tolist() == [-3, 2, 1, 4]


@pytest.mark.clause("KN-ROPE-1", "KN-ROPE-2", "KN-ROPE-4")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [[5, 0, 5, 2], [3, 4, 5, 6], [9, 8, 7, 6]])
def test_within_the_rounding_bound_for_any_positions(dtype, positions, bounds):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 4, 3, 10)).astype(dtype)
    angles = rng.uniform(0, 7, (10, 5))
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    expected, magnitude = rotated(x, cos, sin, positions)
    limit = bounds(dtype)
    for given_positions in (positions, np.array(positions, np.uint32)):
        error = np.abs(rotary_embedding(x, cos, sin, given_positions).astype(np.float64) - expected)
        assert (error <= limit.stored(limit.gamma(2) * magnitude, expected)).all()


@pytest.mark.clause("KN-ROPE-2")
def test_each_token_is_rotated_by_its_own_position():
    cos, sin = rope_tables(rope_frequencies(4, 10000.0), 10, dtype=np.float64)
    x = np.ones((1, 2, 1, 4))
    y = rotary_embedding(x, cos, sin, [5, 0])
    np.testing.assert_array_equal(y[:, 1], x[:, 1])  # position 0 turns nothing; an offset of 5 would turn by 6
    np.testing.assert_allclose(y[0, 0, 0, 0], math.cos(5) - math.sin(5), rtol=1e-14)


@pytest.mark.clause("KN-ROPE-3")
def test_arguments():
    cos, sin = rope_tables(rope_frequencies(4, 1e4), 6)
    x = np.ones((1, 2, 1, 4), np.float32)
    for positions in ([0], [0, 1, 2]):
        with pytest.raises(ShapeError, match="position_ids for 2 tokens"):
            rotary_embedding(x, cos, sin, positions)
    with pytest.raises(InvalidParameterError, match="position 6, expected 0 <= position < 6"):
        rotary_embedding(x, cos, sin, [0, 6])
    with pytest.raises(InvalidParameterError, match="position -1"):
        rotary_embedding(x, cos, sin, [-1, 2])
    with pytest.raises(InvalidParameterError, match="pairing is 'neox'"):
        rotary_embedding(x, cos, sin, [0, 1], pairing="neox")
    for bad in (x[0], x[..., :2], x[..., :3]):
        with pytest.raises(ShapeError, match="rotary_embedding: x"):
            rotary_embedding(bad, cos, sin, [0, 1])
    with pytest.raises(ShapeError):
        rotary_embedding(x, cos, sin[:5], [0, 1])
    assert rotary_embedding(x[:, :0], cos, sin, []).shape == (1, 0, 1, 4)


@pytest.mark.clause("KN-ROPE-5")
def test_pairings():
    x = np.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    cos, sin = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    assert rotary_embedding(x, cos, sin, [0]).reshape(-1).tolist() == [0, 0, 1, 0]
    assert rotary_embedding(x, cos, sin, [0], pairing="adjacent").reshape(-1).tolist() == [0, 1, 0, 0]


@pytest.mark.clause("KN-ROPE-5")
def test_adjacent_is_half_split_on_permuted_features():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 2, 8))
    cos, sin = rope_tables(rope_frequencies(8, 1e4), 9, dtype=np.float64)
    order = np.arange(8).reshape(4, 2).T.reshape(-1)  # 0 2 4 6 1 3 5 7
    adjacent = rotary_embedding(x, cos, sin, [8, 1, 4], pairing="adjacent")
    np.testing.assert_array_equal(adjacent[..., order], rotary_embedding(x[..., order], cos, sin, [8, 1, 4]))


@pytest.mark.clause("KN-ROPE-1")
@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 99))
def test_products_depend_on_the_distance_only(p, q, shift):
    rng = np.random.default_rng(p)
    a, b = rng.standard_normal((2, 1, 1, 1, 16))
    cos, sin = rope_tables(rope_frequencies(16, 1e4), 1000, dtype=np.float64)

    def product(i, j):
        return float((rotary_embedding(a, cos, sin, [i]) * rotary_embedding(b, cos, sin, [j])).sum())

    assert product(p, q) == pytest.approx(product(p + shift, q + shift), abs=1e-11)
    assert (rotary_embedding(a, cos, sin, [p]) ** 2).sum() == pytest.approx((a**2).sum(), rel=1e-14)


@pytest.mark.clause("KN-ROPE-6")
def test_tables():
    frequencies = rope_frequencies(6, 500000.0)
    np.testing.assert_allclose(frequencies, [1, 500000 ** (-1 / 3), 500000 ** (-2 / 3)], rtol=4 * 2**-53)
    cos, sin = rope_tables(frequencies, 4096, scale=0.5)
    assert cos.dtype == sin.dtype == np.float32
    for p in (0, 1, 77, 4095):
        for i, f in enumerate((1.0, 500000 ** (-1 / 3), 500000 ** (-2 / 3))):
            # Half an ulp of float32, and the float64 error of the angle.
            assert abs(float(cos[p, i]) - 0.5 * math.cos(p * f)) <= 2**-26 + 8 * p * f * 2**-53 + 2**-52
            assert abs(float(sin[p, i]) - 0.5 * math.sin(p * f)) <= 2**-26 + 8 * p * f * 2**-53 + 2**-52
    assert rope_tables(frequencies, 0)[0].shape == (0, 3)


@pytest.mark.clause("KN-ROPE-6")
def test_float32_tables_are_those_of_hugging_face():
    torch = pytest.importorskip("torch")
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64))
    angles = torch.arange(2048).float()[:, None] * inverse
    ours = rope_frequencies(64, 10000.0, angle_dtype=np.float32)
    np.testing.assert_allclose(ours, inverse.numpy(), rtol=2**-22)
    cos, _ = rope_tables(inverse.numpy(), 2048)
    np.testing.assert_allclose(cos, angles.cos().numpy(), atol=2**-22)


@pytest.mark.clause("KN-ROPE-6")
def test_table_arguments():
    for head_dim, theta in ((0, 1e4), (5, 1e4), (-2, 1e4), (4, 0.0), (4, math.nan)):
        with pytest.raises(InvalidParameterError):
            rope_frequencies(head_dim, theta)
    with pytest.raises(InvalidParameterError, match="max_positions"):
        rope_tables(np.ones(2), -1)
    with pytest.raises(ShapeError):
        rope_tables(np.ones((2, 2)), 3)
