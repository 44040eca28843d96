"""Attention over contiguous keys and values."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferrum_ref.kernels.attention as module
from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.kernels.attention import attention

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def visible_keys(num_queries: int, num_keys: int, causal: bool, window: int = 0) -> np.ndarray:
    seen = np.zeros((num_queries, num_keys), bool)
    for i in range(num_queries):
        position = num_keys - num_queries + i
        for j in range(num_keys):
            seen[i, j] = not causal or (j <= position and (not window or j > position - window))
    return seen


def in_float64(q, k, v, scale, seen):
    """The equation in float64: output, scores, sum of |q k| terms and probabilities, each with heads first."""
    ratio = q.shape[2] // k.shape[2]
    heads = [np.moveaxis(np.asarray(a, np.float64), 2, 1) for a in (q, k, v)]
    heads[1:] = [np.stack([a[:, h // ratio] for h in range(q.shape[2])], 1) for a in heads[1:]]
    scores = np.einsum("bhid,bhjd->bhij", heads[0], heads[1]) * scale
    magnitude = np.einsum("bhid,bhjd->bhij", np.abs(heads[0]), np.abs(heads[1])) * abs(scale)
    p = np.zeros(scores.shape)
    for row, s, m in zip(
        p.reshape(-1, p.shape[-1]), scores.reshape(-1, p.shape[-1]), np.tile(seen, (p.shape[0] * p.shape[1], 1))
    ):
        if m.any():
            row[m] = np.exp(s[m] - s[m].max())
            row /= math.fsum(row)
    return np.einsum("bhij,bhjd->bihd", p, heads[2]), scores, magnitude, p, heads[2]


def assert_within_the_bound(ours, q, k, v, scale, seen, bounds):
    o, scores, magnitude, p, values = in_float64(q, k, v, scale, seen)
    limit = bounds(ours.dtype).attention(scores, magnitude, p, values, np.moveaxis(o, 2, 1), q.shape[3])
    assert (np.abs(ours.astype(np.float64) - o) <= np.moveaxis(limit, 1, 2)).all()


SHAPES = [  # B, Sq, Skv, H, G, D, causal, window
    (1, 1, 1, 1, 1, 1, True, 0),
    (1, 1, 5, 9, 3, 64, True, 0),
    (2, 7, 7, 4, 4, 16, True, 0),
    (1, 1, 515, 7, 1, 80, True, 0),
    (2, 3, 300, 8, 2, 8, True, 0),
    (1, 70, 200, 4, 2, 6, True, 0),
    (1, 130, 130, 3, 3, 5, True, 0),
    (1, 66, 130, 2, 1, 8, True, 17),
    (1, 1, 90, 2, 1, 8, True, 32),
    (2, 9, 5, 4, 1, 8, True, 0),
    (1, 5, 9, 4, 2, 128, False, 0),
    (1, 100, 33, 2, 2, 4, False, 0),
]


@pytest.mark.clause("KN-ATTN-1", "KN-ATTN-2", "KN-ATTN-3", "KN-ATTN-5", "KN-ATTN-6")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_rounding_bound(dtype, shape, bounds):
    batch, num_queries, num_keys, heads, groups, size, causal, window = shape
    rng = np.random.default_rng(sum(shape))
    q = rng.standard_normal((batch, num_queries, heads, size)).astype(dtype)
    k, v = (rng.standard_normal((batch, num_keys, groups, size)).astype(dtype) for _ in range(2))
    scale = 2.0**-2 * 1.25
    ours = attention(q, k, v, scale, causal, window)
    assert ours.shape == q.shape
    assert ours.dtype == dtype
    assert_within_the_bound(ours, q, k, v, scale, visible_keys(num_queries, num_keys, causal, window), bounds)


@pytest.mark.clause("KN-ATTN-1", "KN-ATTN-2")
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_torch_in_float64(causal):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    q, k, v = rng.standard_normal((2, 12, 6, 32)), *rng.standard_normal((2, 2, 12, 2, 32))
    heads_first = [torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
    np.testing.assert_allclose(attention(q, k, v, None, causal), theirs.transpose(1, 2).numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.clause("KN-ATTN-4")
def test_the_scale_is_honoured():
    q, k, v = (np.array(a).reshape(1, -1, 1, 1) for a in ([1.0], [0.0, math.log(3)], [0.0, 4.0]))
    for scale, expected in ((1.0, 3.0), (0.0, 2.0), (-1.0, 1.0), (None, 3.0), (2.0, 3.6)):
        assert attention(q, k, v, scale)[0, 0, 0, 0] == pytest.approx(expected, rel=1e-15)
    wide = np.ones((1, 1, 1, 300), np.float32)
    assert attention(wide, wide, wide).tolist() == wide.tolist()  # no limit on the head size


@pytest.mark.clause("KN-ATTN-5")
def test_large_scores():
    q, k, v = (np.array(a, np.float32).reshape(1, -1, 1, 1) for a in ([1.0], [1000.0, 999.0], [1.0, 0.0]))
    assert attention(q, k, v, 1.0)[0, 0, 0, 0] == pytest.approx(math.e / (1 + math.e), rel=1e-6)
    assert attention(q, -k, v, 1.0)[0, 0, 0, 0] == pytest.approx(1 / (1 + math.e), rel=1e-6)


@pytest.mark.clause("KN-ATTN-2")
@pytest.mark.parametrize("num_keys", [1, 15, 16, 17, 255, 256, 257, 300, 1030])
def test_a_needle_is_found_at_every_position(num_keys):
    """One key matches; the answer must be its value, wherever it lies, and nothing of a key ahead."""
    k = np.zeros((1, num_keys, 1, 4), np.float32)
    v = np.arange(1.0, num_keys + 1, dtype=np.float32).reshape(1, -1, 1, 1) * np.ones((1, 1, 1, 4), np.float32)
    for place in {0, 1, num_keys // 2, num_keys - 2, num_keys - 1} & set(range(num_keys)):
        k[:] = 0
        k[0, place] = 100
        one = attention(np.ones((1, 1, 1, 4), np.float32), k, v, 1.0, True)
        assert one.reshape(-1).tolist() == [place + 1.0] * 4
        every = attention(np.ones((1, num_keys, 1, 4), np.float32), k, v, 1.0, True)[0, :, 0, 0]
        assert (every[place:] == place + 1).all()
        np.testing.assert_allclose(every[:place], np.arange(2, place + 2) / 2, rtol=1e-5)  # the mean of what is behind


@pytest.mark.clause("KN-ATTN-1")
def test_query_heads_share_their_group_in_order():
    v = np.array([10.0, 20.0, 30.0]).reshape(1, 1, 3, 1)
    out = attention(np.ones((1, 1, 6, 1)), np.ones((1, 1, 3, 1)), v, 1.0)
    assert out.reshape(-1).tolist() == [10, 10, 20, 20, 30, 30]


@pytest.mark.clause("KN-ATTN-3")
def test_queries_that_see_nothing():
    q, k = np.ones((1, 4, 2, 3), np.float32), np.ones((1, 2, 1, 3), np.float32)
    out = attention(q, k, k * 5, 1.0, True)
    assert out[0, :, 0, 0].tolist() == [0, 0, 5, 5]
    for causal in (False, True):
        assert attention(q, k[:, :0], k[:, :0], 1.0, causal).tolist() == np.zeros((1, 4, 2, 3)).tolist()
    assert attention(q[:, :0], k, k).shape == (1, 0, 2, 3)
    assert attention(q[:0], k[:0], k[:0]).shape == (0, 4, 2, 3)
    k[0, 0] = -np.inf
    out = attention(q, k, k, 1.0, True)
    assert np.isnan(out[0, 2]).all()


@pytest.mark.clause("KN-ATTN-6")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 16))
def test_a_window_holds_w_keys(num_queries, num_keys, window, rows_at_a_time):
    k = np.ones((1, num_keys, 1, 1))
    v = (2.0 ** np.arange(num_keys)).reshape(1, -1, 1, 1)  # the mean tells which keys were seen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_QUERY_ROWS", rows_at_a_time)
        out = attention(np.ones((1, num_queries, 1, 1)), k, v, 1.0, True, window)[0, :, 0, 0]
    seen = visible_keys(num_queries, num_keys, True, window)
    expected = [(seen[i] * v[0, :, 0, 0]).sum() / max(1, seen[i].sum()) for i in range(num_queries)]
    np.testing.assert_allclose(out, expected, rtol=1e-13)


@pytest.mark.clause("KN-ATTN-8")
@given(st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_blocks_of_queries_change_only_rounding(rows_at_a_time, num_queries, causal):
    rng = np.random.default_rng(rows_at_a_time)
    q, k, v = rng.standard_normal((2, num_queries, 4, 8)), *rng.standard_normal((2, 2, 37, 2, 8))
    whole = attention(q, k, v, 0.5, causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_QUERY_ROWS", rows_at_a_time)
        np.testing.assert_allclose(attention(q, k, v, 0.5, causal), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.clause("KN-ATTN-8")
def test_memory_stays_small_and_strides_are_free():
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 4096, 8, 16)).astype(np.float32)
    q = rng.standard_normal((1, 256, 32, 16)).astype(np.float32)
    tracemalloc.start()
    out = attention(q, k, k, 0.25, True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes + 3 * 2**24  # all scores at once would be 134 MB; a repeated K or V 4 * 4 MB * H/G
    head_major = np.ascontiguousarray(k.swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(
        attention(q[:, :2], head_major, head_major[:, ::1], 0.25, True),
        attention(q[:, :2], k, k, 0.25, True),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.clause("KN-ATTN-8")
def test_a_nan_reaches_every_query_that_sees_it():
    k = np.ones((1, 6, 1, 2), np.float32)
    v = k.copy()
    v[0, 3] = np.nan
    assert np.isnan(attention(np.ones((1, 6, 1, 2), np.float32), k, v, 1.0, True)[0, 3:]).all()


@pytest.mark.clause("KN-ATTN-7", "KN-ATTN-6")
def test_arguments():
    q, k = np.ones((1, 2, 4, 8), np.float32), np.ones((1, 3, 2, 8), np.float32)
    bad = [(q[0], k, k), (q, k[0], k), (q, k, k[:, :2]), (q, k[..., :4], k), (q[:, :, :3], k, k)]
    bad += [(np.ones((2, 2, 4, 8), np.float32), k, k), (q, k[:, :, :0], k[:, :, :0])]
    for arrays in bad:
        with pytest.raises(ShapeError, match="attention: q"):
            attention(*arrays)
    for window, causal in ((-1, True), (4, False)):
        with pytest.raises(BackendError, match="sliding_window"):
            attention(q, k, k, 1.0, causal, window)
