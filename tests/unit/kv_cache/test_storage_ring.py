"""Caches that keep a window's tokens, against the contiguous one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_ring import RingKvFactory
from ferrum_ref.plugins import load_backend

BACKEND = load_backend("numpy")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
WINDOWS = (5, 0, 3)
SHAPE = KvShape(len(WINDOWS), KV_HEADS, HEAD_DIM)


def params(window: int) -> AttentionParams:
    return AttentionParams(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, True, window)


def run(factory: Any, caches: list[Any], lengths: list[int], seed: int, commit: bool = True) -> list[np.ndarray]:
    """One forward of random rows through every layer: what each layer attends to."""
    rng = np.random.default_rng(seed)
    batch = factory.bind(caches, lengths)
    found = []
    for layer, window in enumerate(WINDOWS):
        rows = rng.standard_normal((3, sum(lengths), HEADS, HEAD_DIM)).astype(np.float32)
        q, k, v = (BACKEND.tensor_factory().from_numpy(np.ascontiguousarray(each)) for each in rows)
        batch.append(layer, *(t.view((0, 0, 0), (sum(lengths), KV_HEADS, HEAD_DIM)) for t in (k, v)))
        found.append(batch.attend(layer, q, params(window)).to_numpy())
    if commit:
        batch.commit()
    return found


@pytest.mark.clause("LM-RING-1", "LM-RING-2", "LM-RING-4")
@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_the_same_rows_are_seen_as_in_a_contiguous_cache(steps: list[list[int]], slack: int, seed: int) -> None:
    ring = RingKvFactory(BACKEND, SHAPE, 64, WINDOWS, slack)
    whole = ContiguousKvFactory(BACKEND, SHAPE, 64)
    rings, wholes = [ring.new_cache() for _ in "ab"], [whole.new_cache() for _ in "ab"]
    for index, lengths in enumerate(steps):
        ours, theirs = run(ring, rings, lengths, seed + index), run(whole, wholes, lengths, seed + index)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.clause("LM-RING-1", "LM-RING-5")
def test_layers_that_slide_stop_growing() -> None:
    factory = RingKvFactory(BACKEND, SHAPE, 1000, WINDOWS, slack_tokens=4)
    cache = factory.new_cache()
    for index in range(30):
        run(factory, [cache], [20], index)
    assert cache.num_tokens == 600
    assert cache.capacities == [8, 1000, 6]
    per_token = 2 * KV_HEADS * HEAD_DIM * 4
    assert cache.size_bytes() == (8 + 1000 + 6) * per_token


@pytest.mark.clause("LM-RING-4")
def test_a_forward_that_fails_leaves_the_window_as_it_was() -> None:
    factory, whole = RingKvFactory(BACKEND, SHAPE, 64, WINDOWS, 0), ContiguousKvFactory(BACKEND, SHAPE, 64)
    caches, wholes = [factory.new_cache()], [whole.new_cache()]
    for each, kept in ((factory, caches), (whole, wholes)):
        run(each, kept, [11], 1)
        run(each, kept, [7], 2, commit=False)
        assert kept[0].num_tokens == 11
    for one, other in zip(run(factory, caches, [2], 3), run(whole, wholes, [2], 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.clause("LM-RING-3")
def test_the_last_tokens_can_be_taken_back_and_no_others() -> None:
    factory, whole = RingKvFactory(BACKEND, SHAPE, 64, WINDOWS, 4), ContiguousKvFactory(BACKEND, SHAPE, 64)
    ours, theirs = factory.new_cache(), whole.new_cache()
    for each, cache in ((factory, ours), (whole, theirs)):
        run(each, [cache], [30], 1)
        cache.truncate(28)
        run(each, [cache], [1], 2)
        cache.truncate(26)
    for one, other in zip(run(factory, [ours], [3], 3), run(whole, [theirs], [3], 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    assert ours.num_tokens == 29
    with pytest.raises(InvalidParameterError, match="truncate to 25 of 29 tokens: a window of 5"):
        ours.truncate(25)
    with pytest.raises(InvalidParameterError, match="truncate to 30 tokens, but 29 are cached"):
        ours.truncate(30)
    ours.truncate(0)
    run(factory, [ours], [3], 4)
    assert ours.num_tokens == 3


@pytest.mark.clause("LM-RING-2", "LM-RING-5")
def test_bad_requests_are_named() -> None:
    factory = RingKvFactory(BACKEND, SHAPE, 12, WINDOWS)
    cache = factory.new_cache()
    with pytest.raises(ResourceExhaustedError, match=r"0 cached . 13 new tokens exceed the context of 12"):
        factory.bind([cache], [13])
    with pytest.raises(InvalidParameterError, match=r"windows \[5, 0\]; expected .* 3 windows"):
        RingKvFactory(BACKEND, SHAPE, 12, (5, 0)).new_cache()
    batch = factory.bind([cache], [1])
    row = BACKEND.tensor_factory().from_numpy(np.zeros((1, HEADS, HEAD_DIM), np.float32))
    kv = row.view((0, 0, 0), (1, KV_HEADS, HEAD_DIM))
    batch.append(0, kv, kv)
    for window in (0, 6):
        with pytest.raises(InvalidParameterError, match=f"window of {window}, but its cache keeps 5"):
            batch.attend(0, row, params(window))
