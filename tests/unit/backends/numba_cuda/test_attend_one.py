"""The kernel for one new token a sequence: every head size and grouping, pages, splits, caps, sinks, special scores."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ferrum_numba.gpu.kernels import attend_one
from ferrum_numba.gpu.kernels.attention import attention as any_tokens
from ferrum_numba.gpu.storage import STORAGES

from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.types.devices import DataType

BF16 = ml_dtypes.bfloat16
U32 = 2.0**-24
UNIT = {np.float32: U32, np.float16: 2.0**-11, BF16: 2.0**-8}
BLOCK = 4  # of a page


def made(backend: Any) -> set[Any]:
    """The makers of the attention kernels that this backend has launched."""
    return {key[0] for key in backend._runtime._kernels} & {attend_one.attend_one, any_tokens}


def drawn(lengths: list[int], heads: int, groups: int, size: int, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Queries (B, H, D), caches in pages that are shuffled, their table, and what lies beyond the lengths: NaN."""
    rng = np.random.default_rng(seed)
    per_sequence = max(1, -(-max(lengths) // BLOCK))
    pages = rng.permutation(len(lengths) * per_sequence + 1)[: len(lengths) * per_sequence]
    table = pages.reshape(len(lengths), per_sequence)
    k, v = (np.full((pages.size + 1, BLOCK, groups, size), np.nan, np.float32) for _ in range(2))
    for row, length in zip(table, lengths, strict=True):
        for position in range(length):
            for cache in (k, v):
                cache[row[position // BLOCK], position % BLOCK] = rng.standard_normal((groups, size))
    q = rng.standard_normal((len(lengths), heads, size))
    return {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype), "table": table, "lengths": lengths}


def reference(case: dict[str, Any], params: AttentionParams, sinks: Any = None) -> Any:
    q, k, v = (case[name].astype(np.float64) for name in "qkv")
    out = np.zeros(q.shape)
    for b, length in enumerate(case["lengths"]):
        rows = [case["table"][b][p // BLOCK] * BLOCK + p % BLOCK for p in range(length)]
        rows = rows[max(0, length - params.sliding_window) :] if params.sliding_window else rows
        for h in range(q.shape[1]):
            if not rows:
                continue
            keys = k.reshape(-1, *k.shape[2:])[rows, h // (q.shape[1] // k.shape[2])]
            values = v.reshape(-1, *v.shape[2:])[rows, h // (q.shape[1] // k.shape[2])]
            scores = params.softmax_scale * (keys @ q[b, h])
            cap = params.logit_softcap
            scores = cap * np.tanh(scores / cap) if cap else scores
            logits = scores if sinks is None else np.append(scores, sinks[h])
            weights = np.exp(logits - logits.max())
            out[b, h] = (weights[: len(rows)] / weights.sum()) @ values
    return out


def run(backend: Any, case: dict[str, Any], params: AttentionParams, sinks: Any = None) -> Any:
    make = backend.tensor_factory().from_numpy
    tensors = [make(case[name]) for name in "qkv"]
    given = None if sinks is None else make(sinks)
    attention = backend.kernel_ops().attention_ops()
    return attention.paged_attention(
        *tensors, case["table"], params, context_lens=case["lengths"], sinks=given
    ).to_numpy()


def check(got: Any, expected: Any, case: dict[str, Any], dtype: Any) -> None:
    roundings = 4.0 * (max(case["lengths"]) + case["q"].shape[-1] + 64)
    largest = np.nanmax(np.abs(case["v"].astype(np.float64)))
    assert (np.abs(got.astype(np.float64) - expected) <= (roundings * U32 + UNIT[dtype]) * largest).all()


@pytest.mark.clause("BK-NCUDA-44")
@pytest.mark.parametrize(
    ("size", "heads", "groups", "dtype"),
    [
        (8, 2, 2, np.float32),
        pytest.param(*(16, 4, 2, BF16), marks=pytest.mark.slow),
        (24, 7, 1, np.float16),
        (64, 4, 1, BF16),
        pytest.param(*(80, 2, 2, np.float16), marks=pytest.mark.slow),
        pytest.param(*(128, 2, 1, np.float32), marks=pytest.mark.slow),
        pytest.param(*(256, 1, 1, BF16), marks=pytest.mark.slow),
    ],
)
def test_every_head_size_and_grouping(tuned: Any, size: int, heads: int, groups: int, dtype: Any) -> None:
    case = drawn([20, 1, 0, 35], heads, groups, size, dtype, size)
    backend, params = tuned(split_keys=24), AttentionParams(heads, groups, size, size**-0.5, True)
    check(run(backend, case, params), reference(case, params), case, dtype)
    assert made(backend) == {attend_one.attend_one}


@pytest.mark.clause("BK-NCUDA-44")
@pytest.mark.parametrize("split_keys", [pytest.param(512, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize(("cap", "has_sinks", "window"), [(5.0, False, 0), (0.0, True, 0), (2.0, True, 9)])
def test_cap_sinks_window_and_splits(tuned: Any, split_keys: int, cap: float, has_sinks: bool, window: int) -> None:
    case = drawn([37, 5], 4, 2, 16, np.float32, 3)
    sinks = np.linspace(-2, 20, 4).astype(np.float32) if has_sinks else None
    params = AttentionParams(4, 2, 16, 0.7, True, window, cap)
    backend = tuned(split_keys=split_keys)
    got = run(backend, case, params, sinks)
    check(got, reference(case, params, sinks), case, np.float32)
    alone = {**case, "q": case["q"][1:], "table": case["table"][1:], "lengths": case["lengths"][1:]}
    assert run(backend, alone, params, sinks)[0].tobytes() == got[1].tobytes()


@pytest.mark.clause("BK-NCUDA-44")
@pytest.mark.parametrize("split_keys", [512, 9])
def test_infinite_scores_and_nan(tuned: Any, split_keys: int) -> None:
    case = drawn([7, 20, 3], 2, 1, 8, np.float32, 4)
    case["q"][:] = 1.0
    flat = case["k"].reshape(-1, 1, 8)
    for b, length in enumerate(case["lengths"]):
        for p in range(length):
            slot = case["table"][b][p // BLOCK] * BLOCK + p % BLOCK
            flat[slot] = -np.inf if b == 0 or (b == 1 and p < 19) else 0.5
    backend, params = tuned(split_keys=split_keys), AttentionParams(2, 1, 8, 1.0, True)
    got = run(backend, case, params)
    assert np.isnan(got[0]).all()
    last = case["table"][1][19 // BLOCK] * BLOCK + 19 % BLOCK
    assert got[1].tolist() == [case["v"].reshape(-1, 8)[last].tolist()] * 2
    assert np.isfinite(got[2]).all()
    flat[case["table"][2][0] * BLOCK + 1] = np.nan
    assert np.isnan(run(backend, case, params)[2]).all()


@pytest.mark.clause("BK-NCUDA-44", "BK-NCUDA-16")
def test_other_heads_addresses_and_token_counts_take_the_other_kernel(tuned: Any) -> None:
    for size, tokens, offset in ((12, 1, 0), (264, 1, 0), (8, 2, 0), (8, 1, 1)):
        backend = tuned()
        make, attention = backend.tensor_factory().from_numpy, backend.kernel_ops().attention_ops()
        rng = np.random.default_rng(size)
        k, v = (rng.standard_normal((1, 5, 1, size)).astype(np.float32) for _ in range(2))
        q = rng.standard_normal((1, tokens, 1, size)).astype(np.float32)
        moved = make(np.concatenate([np.zeros(offset, np.float32), q.reshape(-1)]))
        query = moved.view((offset,), (offset + q.size,)).reshape(q.shape)
        got = attention.attention(query, make(k), make(v), AttentionParams(1, 1, size, 0.3, False)).to_numpy()
        assert made(backend) == {any_tokens}
        scores = 0.3 * np.einsum("td,sd->ts", q[0, :, 0].astype(np.float64), k[0, :, 0])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ v[0, :, 0].astype(np.float64)
        assert np.abs(got[0, :, 0] - expected).max() <= 4096 * U32


@pytest.mark.clause("BK-NCUDA-44")
def test_how_lanes_and_heads_are_grouped() -> None:
    assert [attend_one.lanes_of(size) for size in (8, 32, 40, 64, 80, 128, 136, 256)] == [4, 4, 8, 8, 16, 16, 32, 32]
    assert [attend_one.shared_by(STORAGES[DataType.BF16], heads, 2) for heads in (2, 4, 6, 14)] == [1, 2, 2, 2]
    assert attend_one.shared_by(STORAGES[DataType.FP32], 14, 2) == 1
    assert attend_one.blocks_for(STORAGES[DataType.BF16], 3, 14, 2, 5) == 5 * 4 * 2 * 3
