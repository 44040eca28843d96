"""Capped scores and sinks, in both attention kernels and on both backends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.kernels.attention import attention, paged_attention
from ferrum_ref.numpy_backend.kernel_ops import NumpyAttentionOps
from ferrum_ref.numpy_backend.tensor import NumpyTensor
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.parity_mode import ParityMode

HEADS, GROUPS, HEAD_DIM = 6, 2, 4


def inputs(num_queries: int, num_keys: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, num_queries, HEADS, HEAD_DIM)) * 3
    k, v = rng.standard_normal((2, 2, num_keys, GROUPS, HEAD_DIM))
    return q, k, v, rng.standard_normal(HEADS) * 2


def formula(q: Any, k: Any, v: Any, scale: float, window: int, cap: float, sinks: Any) -> np.ndarray:
    """The definition, one query at a time."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        position = k.shape[1] - q.shape[1] + i
        low = max(0, position - window + 1) if window else 0
        group = h // (HEADS // GROUPS)
        scores = k[b, low : position + 1, group] @ q[b, i, h] * scale
        scores = cap * np.tanh(scores / cap) if cap else scores
        total = np.exp(scores).sum() + (0 if sinks is None else math.exp(sinks[h]))
        out[b, i, h] = np.exp(scores) @ v[b, low : position + 1, group] / total
    return out


@pytest.mark.clause("KN-ATTN-10", "KN-ATTN-11")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 7), (5, 5), (3, 80), (70, 90)])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(("cap", "sinks"), [(2.0, False), (0.0, True), (2.0, True)])
@pytest.mark.parametrize("backend", ["kernel", "numpy", "torch"])
def test_the_definition(num_queries: int, num_keys: int, window: int, cap: float, sinks: bool, backend: str) -> None:
    q, k, v, logits = inputs(num_queries, num_keys)
    extra = logits if sinks else None
    expected = formula(q, k, v, 0.5, window, cap, extra)
    if backend == "kernel":
        found = attention(q, k, v, 0.5, True, window, softcap=cap, sinks=extra)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        return
    chosen = load_backend(backend)
    put = chosen.tensor_factory().from_numpy
    params = AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True, window, cap)
    tensors = [put(each.astype(np.float32)) for each in (q, k, v)]
    ops = chosen.kernel_ops().attention_ops()
    found = ops.attention(*tensors, params, sinks=None if extra is None else put(extra.astype(np.float32)))
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=0, atol=3e-5)


@pytest.mark.clause("KN-PAGED-8")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_blocks_give_the_same(backend: str) -> None:
    q, k, v, logits = (each.astype(np.float32) for each in inputs(3, 16))
    chosen = load_backend(backend)
    put, ops = chosen.tensor_factory().from_numpy, chosen.kernel_ops().attention_ops()
    params = AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True, 5, 2.0)
    whole = ops.attention(*(put(each[:1]) for each in (q, k, v)), params, sinks=put(logits)).to_numpy()
    blocks = [put(np.ascontiguousarray(each[0].reshape(4, 4, GROUPS, HEAD_DIM)[[2, 0, 3, 1]])) for each in (k, v)]
    paged = ops.paged_attention(put(q[:1]), *blocks, [[1, 3, 0, 2]], params, context_lens=[16], sinks=put(logits))
    np.testing.assert_array_equal(paged.to_numpy(), whole)


@pytest.mark.clause("KN-ATTN-10", "KN-ATTN-11")
def test_the_examples_of_the_clauses() -> None:
    one, keys = np.ones((1, 1, 1, 1)), np.array([0.0, 8.0]).reshape(1, 2, 1, 1)
    values = np.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    share = attention(one, keys, values, 1.0, softcap=4.0)[0, 0, 0, 0]
    assert math.log(share / (1 - share)) == pytest.approx(4 * math.tanh(2)) == pytest.approx(3.856, abs=1e-3)
    quarter = attention(one, keys[:, :1], one, 1.0, sinks=np.array([math.log(3)]))
    assert quarter[0, 0, 0, 0] == pytest.approx(0.25)
    unseen = attention(np.ones((1, 2, 1, 1)), keys[:, :1], one, 1.0, True, sinks=np.array([0.0]))
    assert unseen[0, 0, 0, 0] == 0
    far = attention(one, keys[:, :1], one, 1.0, sinks=np.array([1e4]))
    assert far[0, 0, 0, 0] == 0


@pytest.mark.clause("KN-ATTN-11", "KN-ATTN-12")
def test_refusals() -> None:
    q, k, v, logits = inputs(2, 3)
    with pytest.raises(ShapeError, match=r"sinks \(5,\), expected one logit for each of the 6 heads"):
        attention(q, k, v, sinks=logits[:5])
    with pytest.raises(BackendError, match="softcap is -1"):
        attention(q, k, v, softcap=-1.0)
    with pytest.raises(ShapeError, match="sinks"):
        paged_attention(q[:, 0], k, v, [[0], [1]], sinks=logits[:1])
    tensors = [NumpyTensor(each.astype(np.float32)) for each in (q, k, v)]
    ops = NumpyAttentionOps(ParityMode.UPSTREAM)
    plain = AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True)
    capped = AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True, 0, 2.0)
    with pytest.raises(UnsupportedError, match="logit_softcap or sinks"):
        ops.attention(*tensors, capped)
    with pytest.raises(UnsupportedError, match="logit_softcap or sinks"):
        ops.attention(*tensors, plain, sinks=NumpyTensor(logits.astype(np.float32)))
    with pytest.raises(BackendError, match="logit_softcap=-1"):
        AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True, 0, -1.0)
