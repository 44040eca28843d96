"""Paged K/V tensors: the same numbers wherever the blocks lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.interfaces.kv_cache import KvStorage
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import Device

BACKEND = make_backend()
LAYERS, GROUPS, HEADS, HEAD_DIM = 2, 2, 4, 3
SHAPE = KvShape(LAYERS, GROUPS, HEAD_DIM)
PARAMS = AttentionParams(HEADS, GROUPS, HEAD_DIM, 0.5, True)
UNIT = 2.0**-24


def tensor(values: np.ndarray) -> object:
    return BACKEND.tensor_factory().from_numpy(values.astype(np.float32))


@pytest.mark.clause("LM-PAGED-1", "LM-KV-1", "LM-KV-2")
@given(data=st.data())
def test_blocks_anywhere_equal_rows_in_a_row(data: st.DataObject) -> None:
    """The same tokens through paged and contiguous caches; spare and foreign blocks hold NaN."""
    block_size = data.draw(st.sampled_from([1, 2, 5, 16]))
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4))
    lengths = [(cached, data.draw(st.sampled_from([1, new]))) for cached, new in lengths]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    needed = [-(-(cached + new) // block_size) + int(rng.integers(0, 2)) for cached, new in lengths]
    num_blocks = sum(needed) + 2
    storage = PagedKvStorage(BACKEND, SHAPE, num_blocks, block_size)
    factory = ContiguousKvFactory(BACKEND, SHAPE, 64)
    for cache in (*storage.keys, *storage.values):
        cache.to_numpy()[:] = np.nan
    blocks = rng.permutation(num_blocks)
    tables = np.split(blocks, np.cumsum(needed))[:-1]
    caches = [factory.new_cache() for _ in lengths]
    for i, (cached, _) in enumerate(lengths):  # the history, one sequence at a time
        if cached:
            old = rng.standard_normal((2, cached, GROUPS, HEAD_DIM))
            for target in (factory.bind([caches[i]], [cached]), storage.bind([tables[i].tolist()], [0], [cached])):
                for layer in range(LAYERS):
                    target.append(layer, tensor(old[0]), tensor(old[1]))
            caches[i].num_tokens = cached
    new = [n for _, n in lengths]
    rows = rng.standard_normal((2, sum(new), GROUPS, HEAD_DIM))
    q = tensor(rng.standard_normal((sum(new), HEADS, HEAD_DIM)))
    found = []
    starts = [cached for cached, _ in lengths]
    for target in (factory.bind(caches, new), storage.bind([t.tolist() for t in tables], starts, new)):
        target.append(1, tensor(rows[0]), tensor(rows[1]))
        found.append(target.attend(1, q, PARAMS).to_numpy())
    num_keys = max(cached + n for cached, n in lengths)  # each run: two sums of S terms, scores below 40, |v| < 5.5
    assert np.abs(found[0] - found[1]).max() <= 2 * UNIT * 5.5 * (2 * num_keys + 2 * (HEAD_DIM + 4) * 40 + 8)
    for i, (cached, n) in enumerate(lengths):
        keys, values = storage.read(1, tables[i].tolist(), cached + n)
        np.testing.assert_array_equal(keys.to_numpy(), caches[i].keys[1].to_numpy()[: cached + n])
        np.testing.assert_array_equal(values.to_numpy(), caches[i].values[1].to_numpy()[: cached + n])


@pytest.mark.clause("LM-PAGED-2")
def test_a_copied_block_is_equal_and_independent() -> None:
    storage = PagedKvStorage(BACKEND, SHAPE, 5, 4)
    rng = np.random.default_rng(0)
    for cache in (*storage.keys, *storage.values):
        cache.to_numpy()[:] = rng.standard_normal(cache.shape())
    before = [cache.to_numpy().copy() for cache in (*storage.keys, *storage.values)]
    storage.copy_block(1, 3)
    for cache, old in zip((*storage.keys, *storage.values), before, strict=True):
        expected = old.copy()
        expected[3] = old[1]
        np.testing.assert_array_equal(cache.to_numpy(), expected)
    storage.keys[0].to_numpy()[3] = 0
    np.testing.assert_array_equal(storage.keys[0].to_numpy()[1], before[0][1])


@pytest.mark.clause("LM-PAGED-3")
def test_reading_follows_the_table() -> None:
    storage = PagedKvStorage(BACKEND, SHAPE, 4, 2)
    storage.keys[1].to_numpy()[:] = np.arange(4 * 2 * GROUPS * HEAD_DIM).reshape(4, 2, GROUPS, HEAD_DIM)
    keys, values = storage.read(1, [2, 0], 3)
    first = GROUPS * HEAD_DIM
    np.testing.assert_array_equal(keys.to_numpy()[:, 0, 0], [4 * first, 5 * first, 0])
    assert values.shape() == (3, GROUPS, HEAD_DIM)
    assert storage.read(0, [], 0)[0].shape() == (0, GROUPS, HEAD_DIM)


@pytest.mark.clause("LM-PAGED-4")
def test_what_the_storage_refuses() -> None:
    storage = PagedKvStorage(BACKEND, SHAPE, 4, 2)
    calls = [
        lambda: storage.bind([[0, 4]], [0], [1]),
        lambda: storage.bind([[0, -1]], [0], [1]),
        lambda: storage.bind([[0, 1]], [3], [2]),
        lambda: storage.bind([[0, 1]], [1], [0]),
        lambda: storage.bind([[0, 1]], [-1], [1]),
        lambda: storage.copy_block(0, 4),
        lambda: storage.copy_block(-1, 0),
        lambda: storage.read(2, [0], 1),
        lambda: storage.read(0, [0], 3),
        lambda: storage.read(0, [7], 1),
        lambda: PagedKvStorage(BACKEND, SHAPE, 0, 2),
        lambda: PagedKvStorage(BACKEND, SHAPE, 2, 0),
    ]
    for call in calls:
        with pytest.raises(InvalidParameterError, match="PagedKvStorage"):
            call()


@pytest.mark.clause("LM-PAGED-4")
def test_sizes_and_contract() -> None:
    storage: KvStorage = PagedKvStorage(BACKEND, SHAPE, 4, 2)
    assert (storage.num_layers, storage.num_kv_heads, storage.head_dim) == (LAYERS, GROUPS, HEAD_DIM)
    assert storage.device == Device.CPU
    assert PagedKvStorage(BACKEND, SHAPE, 4, 2).size_bytes() == 4 * 2 * 2 * LAYERS * GROUPS * HEAD_DIM * 4
