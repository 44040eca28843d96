"""Soft-cap, sinks, windows, blind and all-masked queries, splits and batches, against a float64 softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams

U32 = 2.0**-24


def reference(q: Any, k: Any, v: Any, scale: float, cap: float, sinks: Any, causal: bool, window: int) -> Any:
    """One sequence in float64: q (T, H, D), k and v (S, G, D)."""
    num_tokens, num_heads, _ = q.shape
    num_keys, num_groups, _ = k.shape
    out = np.zeros(q.shape)
    for t in range(num_tokens):
        own = num_keys - num_tokens + t
        low = max(0, own - window + 1) if window else 0
        keys = range(low, own + 1) if causal else range(num_keys)
        for h in range(num_heads):
            if not len(keys):
                continue
            g = h // (num_heads // num_groups)
            scores = scale * (k[keys, g] @ q[t, h])
            scores = cap * np.tanh(scores / cap) if cap else scores
            logits = scores if sinks is None else np.append(scores, sinks[h])
            weights = np.exp(logits - logits.max())
            out[t, h] = (weights[: len(scores)] / weights.sum()) @ v[keys, g]
    return out


def drawn(num_tokens: int, num_keys: int, num_heads: int, num_groups: int, size: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(num_keys)
    shapes = ((num_tokens, num_heads, size), (num_keys, num_groups, size), (num_keys, num_groups, size))
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v


def check(got: Any, expected: Any, v: Any, num_keys: int, scores: float) -> None:
    """A generous first-order bound: each weight moves by the error of its score, sums by one rounding a key."""
    roundings = 4.0 * (num_keys + 64) + 8.0 * scores
    assert (np.abs(got - expected) <= roundings * U32 * np.abs(v).max()).all()


@pytest.mark.clause("BK-NCUDA-16")
@pytest.mark.parametrize("split_keys", [512, 11])
@pytest.mark.parametrize(
    ("cap", "has_sinks", "causal", "window"),
    [(5.0, False, True, 0), (0.0, True, True, 0), (2.0, True, True, 9), (3.0, True, False, 0)],
)
def test_cap_sinks_and_window_are_honoured(
    tuned: Any, split_keys: int, cap: float, has_sinks: bool, causal: bool, window: int
) -> None:
    q, k, v = drawn(3, 37, 4, 2, 40)
    sinks = np.array([0.5, -2.0, 30.0, 1.0], np.float32) if has_sinks else None
    backend = tuned(split_keys=split_keys)
    make = backend.tensor_factory().from_numpy
    params = AttentionParams(4, 2, 40, 0.7, causal, window, cap)
    got = (
        backend.kernel_ops()
        .attention_ops()
        .attention(make(q[None]), make(k[None]), make(v[None]), params, sinks=None if sinks is None else make(sinks))
    )
    expected = reference(*(x.astype(np.float64) for x in (q, k, v)), 0.7, cap, sinks, causal, window)
    check(got.to_numpy()[0], expected, v, 37, 40.0)


@pytest.mark.clause("BK-NCUDA-16")
@pytest.mark.parametrize("split_keys", [512, 3])
def test_queries_without_keys_and_with_minus_infinity_only(tuned: Any, split_keys: int) -> None:
    backend = tuned(split_keys=split_keys)
    make, attention = backend.tensor_factory().from_numpy, backend.kernel_ops().attention_ops()
    params = AttentionParams(1, 1, 2, 1.0, True)
    q = np.ones((1, 7, 1, 2), np.float32)
    k = np.zeros((1, 5, 1, 2), np.float32)
    k[0, :3] = -np.inf
    v = np.arange(10, dtype=np.float32).reshape(1, 5, 1, 2)
    out = attention.attention(make(q), make(k), make(v), params).to_numpy()[0, :, 0]
    assert out[:2].tolist() == [[0.0, 0.0]] * 2
    assert np.isnan(out[2:5]).all()
    assert out[5:].tolist() == [[6.0, 7.0], [7.0, 8.0]]
    sinks = make(np.array([0.0], np.float32))
    out = attention.attention(make(q), make(k), make(v), params, sinks=sinks).to_numpy()[0, :, 0]
    assert out[:5].tolist() == [[0.0, 0.0]] * 5
    assert out[5].tolist() == [3.0, 3.5]
    k[0, 4] = np.nan
    assert np.isnan(attention.attention(make(q), make(k), make(v), params).to_numpy()[0, 6]).all()
    assert out[5].tolist() == [3.0, 3.5]


@pytest.mark.clause("BK-NCUDA-16")
def test_a_key_that_a_query_does_not_see_cannot_harm_it(backend: Any) -> None:
    make, attention = backend.tensor_factory().from_numpy, backend.kernel_ops().attention_ops()
    q, k, v = drawn(4, 6, 2, 1, 8)
    v[5] = np.nan
    params = AttentionParams(2, 1, 8, 0.35, True)
    out = attention.attention(make(q[None]), make(k[None]), make(v[None]), params).to_numpy()[0]
    assert np.isfinite(out[:3]).all()
    assert np.isnan(out[3]).all()


@pytest.mark.clause("BK-NCUDA-16")
def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch(tuned: Any) -> None:
    backend = tuned(split_keys=16)
    make, attention = backend.tensor_factory().from_numpy, backend.kernel_ops().attention_ops()
    rng = np.random.default_rng(5)
    caches = [make(rng.standard_normal((9, 8, 1, 16)).astype(np.float32)) for _ in range(2)]
    q = rng.standard_normal((2, 2, 16)).astype(np.float32)
    params = AttentionParams(2, 1, 16, 0.25, True)
    table, lens = np.array([[3, 1, 0, 8, 5], [2, 4, -1, -1, -1]]), [37, 12]
    both = attention.paged_attention(make(q), *caches, table, params, context_lens=lens).to_numpy()
    for b in range(2):
        alone = attention.paged_attention(
            make(q[b : b + 1]), *caches, table[b : b + 1], params, context_lens=lens[b : b + 1]
        )
        assert alone.to_numpy()[0].tobytes() == both[b].tobytes()
    again = attention.paged_attention(make(q), *caches, table, params, context_lens=lens).to_numpy()
    assert again.tobytes() == both.tobytes()


@pytest.mark.clause("BK-NCUDA-16")
def test_scores_beyond_the_range_of_exp_are_no_problem(backend: Any, tensor: Any, kernels: Any) -> None:
    k = tensor(np.array([1000.0, 999.0]).reshape(1, 2, 1, 1))
    v = tensor(np.array([1.0, 0.0]).reshape(1, 2, 1, 1))
    q = tensor(np.ones((1, 1, 1, 1)))
    got = kernels.attention_ops().attention(q, k, v, AttentionParams(1, 1, 1, 1.0, False)).to_numpy().item()
    assert abs(got - math.e / (math.e + 1.0)) <= 8 * U32


@pytest.mark.clause("BK-NCUDA-16")
def test_what_does_not_fit_is_refused(kernels: Any, tensor: Any) -> None:
    attention = kernels.attention_ops()
    q, k = tensor(np.zeros((1, 1, 2, 4))), tensor(np.zeros((1, 3, 1, 4)))
    params = AttentionParams(2, 1, 4, 0.5, True)
    for call, error in (
        (lambda: attention.attention(q, k, tensor(np.zeros((1, 2, 1, 4))), params), ShapeError),
        (lambda: attention.attention(q, k, k, AttentionParams(2, 2, 4, 0.5, True)), ShapeError),
        (lambda: attention.attention(q, k, k, params, sinks=tensor([1.0])), ShapeError),
        (lambda: attention.attention(q, k, tensor(np.zeros((1, 3, 1, 4)), np.float16), params), BackendError),
        (lambda: attention.paged_attention(q, k, k, [[0, 1]], params, context_lens=[4]), BackendError),
        (lambda: attention.paged_attention(q, k, k, [[0]], params, context_lens=[4]), BackendError),
        (lambda: attention.paged_attention(q, k, k, [[0]], params, context_lens=[1, 2]), ShapeError),
    ):
        with pytest.raises(error, match="attention"):
            call()
    wide = tensor(np.zeros((1, 1, 1, 1025)))
    with pytest.raises(UnsupportedError, match="head_dim: got 1025, expected at most 1024"):
        attention.attention(wide, wide, wide, AttentionParams(1, 1, 1025, 1.0, True))
