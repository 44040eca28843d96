"""Attention over contiguous and paged keys against a float64 formula, and what must not change it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, ShapeError
from ferrum_ref.interfaces.kernel_ops import AttentionParams

RNG = np.random.default_rng(23)


def attend64(q: Any, k: Any, v: Any, params: AttentionParams, sinks: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """One sequence: q (T, H, D), k and v (S, G, D) -> (o, a bound on the error of a float32 run), both (T, H, D)."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    (num_tokens, heads, size), num_keys = q.shape, k.shape[0]
    k, v = (np.repeat(array, heads // params.num_kv_heads, axis=1) for array in (k, v))
    scores = np.float64(np.float32(params.softmax_scale)) * np.einsum("thd,shd->ths", q, k)
    magnitude = abs(params.softmax_scale) * np.einsum("thd,shd->ths", np.abs(q), np.abs(k))
    if params.logit_softcap:
        scores = params.logit_softcap * np.tanh(scores / params.logit_softcap)
    own = num_keys - num_tokens + np.arange(num_tokens)[:, None]
    place = np.arange(num_keys)[None]
    visible = np.ones((num_tokens, num_keys), bool) if not params.causal else place <= own
    if params.sliding_window:
        visible &= place > own - params.sliding_window
    scores = np.where(visible[:, None], scores, -np.inf)
    extra = (
        np.full((num_tokens, heads, 1), -np.inf)
        if sinks is None
        else np.broadcast_to(np.asarray(sinks, np.float64)[:, None], (num_tokens, heads, 1))
    )
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), extra)
    lowered = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - lowered)
    total = weights.sum(-1, keepdims=True) + np.exp(extra - lowered)
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    moved = (
        (size + 4) * magnitude
        + np.abs(np.where(visible[:, None], scores, 0.0) - np.where(np.isfinite(top), top, 0.0))
        + 12
    )
    bound = 2.0**-24 * (
        2 * np.einsum("ths,shd->thd", p * moved, np.abs(v)) * 2 + 4 * num_keys * np.einsum("ths,shd->thd", p, np.abs(v))
    )
    return np.einsum("ths,shd->thd", p, v), bound


def check(result: Any, want: np.ndarray, bound: np.ndarray) -> None:
    assert np.all(np.abs(result.to_numpy().astype(np.float64) - want) <= bound + 1e-38)


@pytest.mark.clause("BK-NCPU-10")
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "groups", "size", "options"),
    [
        (1, 700, 9, 3, 64, {}),
        (5, 5, 4, 4, 80, {}),
        (40, 1100, 4, 1, 64, {}),
        (3, 1600, 2, 2, 120, {"sliding_window": 600}),
        (30, 600, 2, 1, 48, {"sliding_window": 7}),
        (4, 40, 2, 1, 256, {"causal": False}),
        (2, 530, 7, 1, 64, {"logit_softcap": 3.0}),
        (7, 3, 2, 1, 16, {}),
        (200, 300, 4, 2, 32, {"sliding_window": 90}),
        (103, 700, 3, 1, 20, {"sliding_window": 100}),
        (130, 130, 6, 3, 16, {"logit_softcap": 2.0}),
        (70, 40, 2, 2, 24, {"causal": False}),
        (65, 64, 3, 1, 8, {"softmax_scale": -0.7}),
        (3, 20, 2, 1, 10, {"softmax_scale": -0.7}),
        (1, 1, 1, 1, 1, {"softmax_scale": 0.0}),
    ],
)
def test_attention(
    kernels: Any, tensor: Any, tokens: int, keys: int, heads: int, groups: int, size: int, options: dict[str, Any]
) -> None:
    chosen = {"softmax_scale": size**-0.5, "causal": True, **options}
    params = AttentionParams(num_heads=heads, num_kv_heads=groups, head_dim=size, **chosen)
    q = RNG.normal(size=(1, tokens, heads, size)).astype(np.float32)
    k, v = RNG.normal(size=(2, 1, keys, groups, size)).astype(np.float32)
    sinks = RNG.normal(size=heads).astype(np.float32)
    for extra in (None, sinks):
        found = kernels.attention_ops().attention(
            tensor(q), tensor(k), tensor(v), params, sinks=None if extra is None else tensor(extra)
        )
        want, bound = attend64(q[0], k[0], v[0], params, extra)
        check(found, want[None], bound[None])


@pytest.mark.clause("BK-NCPU-10")
def test_rows_that_see_nothing(kernels: Any, tensor: Any) -> None:
    attention = kernels.attention_ops().attention
    params = AttentionParams(num_heads=1, num_kv_heads=1, head_dim=2, softmax_scale=1.0, causal=True)
    q, kv = np.ones((1, 3, 1, 2)), np.full((1, 1, 1, 2), 5.0)
    assert attention(tensor(q), tensor(kv), tensor(kv), params).to_numpy()[0, :, 0, 0].tolist() == [0.0, 0.0, 5.0]
    empty = np.zeros((1, 0, 1, 2))
    assert not attention(tensor(q), tensor(empty), tensor(empty), params).to_numpy().any()
    assert not attention(tensor(q), tensor(empty), tensor(empty), params, sinks=tensor([3.0])).to_numpy().any()
    hidden = np.full((1, 3, 1, 2), -np.inf)
    assert np.isnan(attention(tensor(q), tensor(hidden), tensor(np.ones((1, 3, 1, 2))), params).to_numpy()).all()


@pytest.mark.clause("BK-NCPU-10")
def test_a_block_of_hidden_keys_does_not_spoil_the_rest(kernels: Any, tensor: Any) -> None:
    params = AttentionParams(num_heads=1, num_kv_heads=1, head_dim=1, softmax_scale=1.0, causal=True)
    k, v = np.zeros((1, 1100, 1, 1)), np.arange(1100.0).reshape(1, 1100, 1, 1)
    k[0, :1098] = -np.inf  # the first two parts hold no score above -inf
    found = kernels.attention_ops().attention(tensor([[[[1.0]]]]), tensor(k), tensor(v), params)
    assert float(found.to_numpy().item()) == 1098.5


@pytest.mark.clause("BK-NCPU-10", "BK-NCPU-11")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_query_of_a_prompt_does_not_depend_on_the_others(data: st.DataObject) -> None:
    """A prompt whole, in pieces of five queries and more over a growing cache, and beside another: the same bits."""
    from ferrum_numba.cpu import make_backend

    backend = make_backend("cpu")
    make, attend = backend.tensor_factory().from_numpy, backend.kernel_ops().attention_ops().paged_attention
    groups, ratio, size = (data.draw(st.sampled_from(values)) for values in ((1, 2, 3), (1, 3, 5), (8, 20, 33)))
    block = data.draw(st.sampled_from((1, 5, 16, 48)))
    lens = [data.draw(st.sampled_from((5, 40, 130, 513, 700))) for _ in range(2)]
    tokens = data.draw(st.integers(5, min(*lens, 120)))
    params = AttentionParams(
        num_heads=groups * ratio,
        num_kv_heads=groups,
        head_dim=size,
        softmax_scale=size**-0.5,
        causal=True,
        sliding_window=data.draw(st.sampled_from((0, 3, 100, 600))),
    )
    dtype = data.draw(st.sampled_from((np.float32, np.float16)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    most = -(-max(lens) // block)
    tables = rng.permutation(2 * most).reshape(2, most)
    caches = [make(rng.normal(size=(2 * most, block, groups, size)).astype(dtype)) for _ in range(2)]
    q = rng.normal(size=(2, tokens, groups * ratio, size)).astype(dtype)
    both = attend(make(q), *caches, tables, params, context_lens=lens).to_numpy()
    for b, length in enumerate(lens):
        pieces, done = [], 0
        while done < tokens:
            count = data.draw(st.integers(5, tokens)) if tokens - done >= 10 else tokens - done
            count = count if tokens - done - count >= 5 else tokens - done
            piece = make(q[b : b + 1, done : done + count])
            end = length - tokens + done + count
            pieces.append(attend(piece, *caches, tables[b : b + 1], params, context_lens=[end]).to_numpy())
            done += count
        assert np.array_equal(np.concatenate(pieces, axis=1)[0], both[b])


@pytest.mark.clause("BK-NCPU-10")
def test_parts_of_the_keys_begin_where_they_begin_for_all(kernels: Any, tensor: Any) -> None:
    """A window that begins inside a part: sums are joined at 512, 1024, ... wherever a run of queries began."""
    params = AttentionParams(
        num_heads=1, num_kv_heads=1, head_dim=16, softmax_scale=0.25, causal=True, sliding_window=900
    )
    q, k, v = (RNG.normal(size=(1, length, 1, 16)) for length in (30, 1300, 1300))
    attention = kernels.attention_ops().attention
    whole = attention(tensor(q), tensor(k), tensor(v), params).to_numpy()
    for start in (7, 19):
        assert np.array_equal(
            attention(tensor(q[:, start:]), tensor(k), tensor(v), params).to_numpy(), whole[:, start:]
        )


@pytest.mark.clause("BK-NCPU-10")
@pytest.mark.parametrize("window", [0, 1, 30, 100, 600])
def test_a_tile_stays_within_its_part_of_the_keys(window: int) -> None:
    """For rows of queries at every position near a part's ends: no key too few, none beyond the part."""
    from ferrum_numba.cpu.prefill import visible_to_tile

    ratio, part = 3, (512, 1024, 1, window)
    for position in (*range(-6, 6), *range(500, 630), *range(1010, 1140), *range(1600, 1640)):
        for taken in (1, 4, 12):
            seen = [
                key - 512
                for query in {position + (1 + row) // ratio for row in range(taken)}
                for key in range(512, 1024)
                if key <= query and (not window or key > query - window)
            ]
            low, high = visible_to_tile(position, 1, taken, ratio, part)
            assert 0 <= low <= high <= 512
            assert not seen or (low, high) == (min(seen), max(seen) + 1)


@pytest.mark.clause("BK-NCPU-10")
def test_a_tile_takes_no_other_keys_than_its_own() -> None:
    """Behind a prompt's last key lie values that are infinite, and before its window too: factors of 0 would show."""
    from ferrum_numba.cpu import make_backend

    backend = make_backend("cpu")
    params = AttentionParams(num_heads=1, num_kv_heads=1, head_dim=1, softmax_scale=1.0, causal=True, sliding_window=64)
    q, k = np.zeros((1, 12, 1, 1), np.float32), np.zeros((1, 200, 1, 1), np.float32)
    v = np.full((1, 200, 1, 1), np.inf, np.float32)
    v[0, 200 - 12 - 63 :] = 1.0
    make = backend.tensor_factory().from_numpy
    found = backend.kernel_ops().attention_ops().attention(make(q), make(k), make(v), params).to_numpy()
    assert np.array_equal(found, np.ones_like(found))


@pytest.mark.clause("BK-NCPU-4", "BK-NCPU-10")
def test_splitting_the_keys_gives_the_same_bits(kernels: Any, tensor: Any, threads: Any) -> None:
    """A query alone, beside others, in a batch, with one thread and with two; a prompt alone and in a batch."""
    params = AttentionParams(num_heads=6, num_kv_heads=2, head_dim=64, softmax_scale=0.125, causal=True)
    q = RNG.normal(size=(1, 20, 6, 64))
    k, v = RNG.normal(size=(2, 1, 1300, 2, 64))
    attention = kernels.attention_ops().attention
    some = attention(tensor(q[:, -4:]), tensor(k), tensor(v), params).to_numpy()
    prompt = attention(tensor(q), tensor(k), tensor(v), params).to_numpy()
    for count in (1, 2):
        threads(count)
        alone = attention(tensor(q[:, -1:]), tensor(k), tensor(v), params).to_numpy()
        assert np.array_equal(alone, some[:, -1:])
        assert np.array_equal(attention(tensor(q), tensor(k), tensor(v), params).to_numpy(), prompt)
        for queries in (q, q[:, -4:]):
            once = attention(*(tensor(array) for array in (queries, k, v)), params).to_numpy()
            twice = attention(*(tensor(np.repeat(array, 2, axis=0)) for array in (queries, k, v)), params).to_numpy()
            assert np.array_equal(twice, np.repeat(once, 2, axis=0))


@pytest.mark.clause("BK-NCPU-11")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_paged_equals_contiguous_to_the_bit(kernels: Any, tensor: Any, dtype: Any, tokens: int) -> None:
    params = AttentionParams(num_heads=4, num_kv_heads=2, head_dim=32, softmax_scale=0.2, causal=True)
    ops, lens, block = kernels.attention_ops(), [700, 9, 33], 16
    caches = np.full((2, 60, block, 2, 32), np.nan, np.float32)  # slots that nobody has hold NaN
    table = np.full((3, 45), -1)
    order = iter(RNG.permutation(60))
    q = RNG.normal(size=(3, tokens, 4, 32)).astype(dtype)
    rows = [RNG.normal(size=(2, length, 2, 32)).astype(dtype) for length in lens]
    for b, length in enumerate(lens):
        for place in range(-(-length // block)):
            table[b, place] = next(order)
            part = rows[b][:, place * block : (place + 1) * block]
            caches[:, table[b, place], : part.shape[1]] = part
    queries = tensor(q[:, 0] if tokens == 1 else q, dtype)
    paged = ops.paged_attention(
        queries, tensor(caches[0], dtype), tensor(caches[1], dtype), table, params, context_lens=lens
    ).to_numpy()
    for b in range(3):
        k, v = (tensor(array[None], dtype) for array in rows[b])
        alone = ops.attention(tensor(q[b : b + 1], dtype), k, v, params).to_numpy()
        assert np.array_equal(paged[b].reshape(alone[0].shape), alone[0])
    flat = ops.paged_attention(
        tensor(q[:1, :1], dtype), *(tensor(np.nan_to_num(cache), dtype) for cache in caches), table[0, :3], params
    )
    k, v = (tensor(array[None, :48], dtype) for array in rows[0])
    assert np.array_equal(flat.to_numpy(), ops.attention(tensor(q[:1, :1], dtype), k, v, params).to_numpy())


@pytest.mark.clause("BK-NCPU-11", "BK-NCPU-10")
def test_what_does_not_fit_is_named(kernels: Any, tensor: Any) -> None:
    params = AttentionParams(num_heads=2, num_kv_heads=1, head_dim=4, softmax_scale=0.5, causal=True)
    ops, q, cache = kernels.attention_ops(), tensor(np.ones((1, 2, 4))), tensor(np.ones((3, 2, 1, 4)))
    for table, lens, words in (
        ([[0, 3]], [4], r"block_table\[0\] names block 3"),
        ([[0, -1]], [3], r"block_table\[0\] names block -1"),
        ([[0, 1]], [5], "the covered slots"),
        ([[0, 1]], [-1], "the covered slots"),
        ([[0, 1], [0, 1]], [1], "one row and one length"),
    ):
        with pytest.raises(BackendError, match=words):
            ops.paged_attention(q, cache, cache, table, params, context_lens=lens)
    with pytest.raises(ShapeError, match="as params say"):
        ops.attention(*(tensor(np.ones((1, 1, 2, 4))) for _ in range(3)), params)
    with pytest.raises(ShapeError, match="one number a query head"):
        ops.paged_attention(q, cache, cache, [[0]], params, context_lens=[1], sinks=tensor([1.0]))


@pytest.mark.clause("BK-NCPU-14")
@pytest.mark.parametrize("slots", [[1, 2, 3], [0, 2, 3], [1, 1, 2], [3, 2, 1], [-1, 0, 1], [-2, -1, 0], [2, 3, 3]])
def test_write_kv_into_runs_and_gaps(kernels: Any, tensor: Any, slots: list[int]) -> None:
    cache, rows = tensor(np.zeros((2, 2, 1, 1))), tensor(np.arange(1.0, 4.0).reshape(3, 1, 1))
    kernels.attention_ops().write_kv(cache, rows, slots)
    want = [0.0] * 4
    for row, slot in enumerate(slots):
        if slot >= 0:
            want[slot] = row + 1.0
    assert cache.to_numpy().reshape(4).tolist() == want


@pytest.mark.clause("BK-NCPU-14")
def test_write_kv(kernels: Any, tensor: Any) -> None:
    write = kernels.attention_ops().write_kv
    cache = tensor(np.zeros((2, 3, 1, 2)), ml_dtypes.bfloat16)
    rows = tensor(np.arange(8).reshape(4, 1, 2) + 1, ml_dtypes.bfloat16)
    write(cache, rows, [5, -1, 2, 5])
    flat = cache.to_numpy().reshape(6, 2).astype(np.float32)
    assert flat[5].tolist() == [7.0, 8.0]  # of equal slots the last row stays
    assert flat[2].tolist() == [5.0, 6.0]
    assert not flat[[0, 1, 3, 4]].any()
    before = cache.to_numpy().copy()
    for bad, words in (
        (lambda: write(cache, rows, [0, 1, 2, 6]), "slot 6"),
        (lambda: write(cache, rows, [0, 1, 2]), "one for each"),
        (lambda: write(cache, tensor(np.ones((4, 1, 2))), [0, 1, 2, 3]), "one element type"),
        (lambda: write(type(cache)(cache.data[:, ::2]), rows, [0, 1, 2, 3]), "contiguous cache"),
    ):
        with pytest.raises(BackendError, match=words):
            bad()
    assert np.array_equal(cache.to_numpy().view(np.uint16), before.view(np.uint16))
