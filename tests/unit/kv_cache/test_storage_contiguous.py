"""Contiguous caches against plain lists of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType

BACKEND = make_backend()
LAYERS, GROUPS, HEADS, HEAD_DIM = 2, 2, 4, 3
SHAPE = KvShape(LAYERS, GROUPS, HEAD_DIM)
PARAMS = AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True)


def tensor(values: np.ndarray) -> object:
    return BACKEND.tensor_factory().from_numpy(values.astype(np.float32))


def error_bound(*caches: tuple[np.ndarray, np.ndarray]) -> float:
    """float32 softmax over S keys: S roundings in its sum, S in the weighted sum, D and some in score and exp."""
    num_keys = max(len(keys) for keys, _ in caches)
    size = max(np.abs(values).max() for _, values in caches)
    score = 0.5 * max(np.abs(keys).max() for keys, _ in caches) * 5 * HEAD_DIM  # |q| < 5
    return float(2.0**-24 * size * (2 * num_keys + 2 * (HEAD_DIM + 4) * score + 8))


def attention64(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """softmax(q.k / 2) v by the textbook, one query at a time, in float64; the last query sees everything."""
    out = np.zeros(q.shape)
    for t in range(len(q)):
        seen = len(keys) - len(q) + t + 1
        for h in range(HEADS):
            group = h // (HEADS // GROUPS)
            scores = keys[:seen, group].astype(np.float64) @ q[t, h].astype(np.float64) * 0.5
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ values[:seen, group].astype(np.float64)
    return out


@pytest.mark.clause("LM-KV-1", "LM-KV-2", "LM-KV-3", "LM-KV-4")
@example(steps=[[200, 0, 1], [100, 257, 300], [1, 2, 3]], seed=1)  # grows twice with something in it
@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_many_steps_of_three_sequences(steps: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    factory = ContiguousKvFactory(BACKEND, SHAPE, 600)
    caches = [factory.new_cache() for _ in range(3)]
    kept = [[(np.empty((0, GROUPS, HEAD_DIM)),) * 2 for _ in range(LAYERS)] for _ in range(3)]
    for step in steps:
        active = [i for i in range(3) if step[i]]
        if not active:
            continue
        batch = factory.bind([caches[i] for i in active], [step[i] for i in active])
        for layer in range(LAYERS):
            new = [rng.standard_normal((2, step[i], GROUPS, HEAD_DIM)).astype(np.float32) for i in active]
            queries = [rng.standard_normal((step[i], HEADS, HEAD_DIM)).astype(np.float32) for i in active]
            rows = np.concatenate(new, axis=1)
            batch.append(layer, tensor(rows[0]), tensor(rows[1]))
            for i, (k, v) in zip(active, new, strict=True):
                old_k, old_v = kept[i][layer]
                kept[i][layer] = (np.concatenate([old_k, k]), np.concatenate([old_v, v]))
            found = batch.attend(layer, tensor(np.concatenate(queries)), PARAMS).to_numpy()
            exact = np.concatenate([attention64(q, *kept[i][layer]) for i, q in zip(active, queries, strict=True)])
            assert found.shape == exact.shape
            assert np.abs(found - exact).max() <= error_bound(*(kept[i][layer] for i in active))
        assert [cache.num_tokens for cache in caches] == [len(k[0][0]) - n for k, n in zip(kept, step, strict=True)]
        batch.commit()
    for cache, layers in zip(caches, kept, strict=True):
        assert cache.num_tokens == len(layers[0][0])
        for layer, (k, v) in enumerate(layers):
            if cache.num_tokens:
                np.testing.assert_array_equal(cache.keys[layer].to_numpy()[: cache.num_tokens], k)
                np.testing.assert_array_equal(cache.values[layer].to_numpy()[: cache.num_tokens], v)


@pytest.mark.clause("LM-KV-3")
def test_room_grows_by_doubling_up_to_the_context() -> None:
    cache = ContiguousKvFactory(BACKEND, SHAPE, 1000).new_cache()
    assert (cache.capacity, cache.size_bytes()) == (0, 0)
    capacities = []
    for num_tokens in (0, 255, 256, 512, 999, 1000):
        cache.num_tokens = num_tokens
        cache.reserve(min(1, 1000 - num_tokens))
        capacities.append(cache.capacity)
    assert capacities == [256, 256, 512, 1000, 1000, 1000]
    assert cache.size_bytes() == 1000 * 2 * LAYERS * GROUPS * HEAD_DIM * 4


@pytest.mark.clause("LM-KV-3")
def test_a_full_context_refuses_and_keeps_what_it_has() -> None:
    factory = ContiguousKvFactory(BACKEND, SHAPE, 10)
    small, full = factory.new_cache(), factory.new_cache()
    full.reserve(10)
    full.num_tokens = 10
    with pytest.raises(ResourceExhaustedError, match="10 cached \\+ 1 new"):
        factory.bind([small, full], [3, 1])
    assert (small.num_tokens, full.num_tokens) == (0, 10)


@pytest.mark.clause("LM-KV-3")
def test_truncation_forgets_the_tail_only() -> None:
    cache = ContiguousKvFactory(BACKEND, SHAPE, 10).new_cache()
    cache.reserve(5)
    cache.num_tokens = 5
    cache.truncate(2)
    assert cache.num_tokens == 2
    for length in (-1, 3):
        with pytest.raises(InvalidParameterError, match="truncate"):
            cache.truncate(length)
    with pytest.raises(InvalidParameterError, match="max_tokens"):
        ContiguousKvFactory(BACKEND, SHAPE, 0).new_cache()


@pytest.mark.clause("LM-KV-3")
def test_bytes_count_both_caches_of_all_layers() -> None:
    assert KvShape(30, 3, 64).bytes_per_token() == 46080
    assert KvShape(32, 8, 128, DataType.BF16).bytes_per_token() == 131072


@pytest.mark.clause("LM-KV-3")
def test_a_backend_without_attention_is_refused() -> None:
    class Bare(type(BACKEND)):  # type: ignore[misc]
        def kernel_ops(self) -> None:
            return None

    with pytest.raises(UnsupportedError, match="offers no attention"):
        ContiguousKvFactory(Bare(), SHAPE, 4).new_cache()
