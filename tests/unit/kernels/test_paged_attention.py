"""Attention over keys and values that lie in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.kernels.attention import gather_blocks, paged_attention

HEADS, GROUPS, SIZE = 4, 2, 6


def sequence_by_sequence(q, k_cache, v_cache, table, lengths, scale, causal=True):
    """Position by position in plain Python: gather, score, exponentiate, average; float64."""
    block_size = k_cache.shape[1]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        last = lengths[b] - q.shape[1] + t if causal else lengths[b] - 1
        weights, total = 0.0, np.zeros(SIZE)
        rows = [(table[b][p // block_size], p % block_size) for p in range(last + 1)]
        scores = [float(q[b, t, h] @ k_cache[block, row, h // (HEADS // GROUPS)]) * scale for block, row in rows]
        for (block, row), score in zip(rows, scores):
            weight = np.exp(score - max(scores))
            weights += weight
            total += weight * v_cache[block, row, h // (HEADS // GROUPS)]
        if rows:
            out[b, t, h] = total / weights
    return out


@pytest.mark.clause("KN-PAGED-1", "KN-PAGED-2", "KN-PAGED-3", "KN-PAGED-5", "KN-PAGED-6")
@given(st.data())
def test_equals_a_plain_loop_over_positions(data):
    block_size = data.draw(st.sampled_from([1, 3, 4]))
    num_blocks = data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(0, min(18, num_blocks * block_size)), min_size=1, max_size=3))
    num_new = data.draw(st.integers(1, 5))
    causal = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    k_cache, v_cache = (np.full((num_blocks, block_size, GROUPS, SIZE), np.nan) for _ in range(2))
    table = np.full((len(lengths), num_blocks + 1), -1)
    for b, length in enumerate(lengths):  # sequences may share blocks: each is written where any of them needs it
        blocks = rng.permutation(num_blocks) if data.draw(st.booleans()) else np.arange(num_blocks)
        table[b, : -(-length // block_size)] = blocks[: -(-length // block_size)]
        for p in range(length):
            place = table[b, p // block_size], p % block_size
            k_cache[place], v_cache[place] = rng.standard_normal((2, GROUPS, SIZE))
    q = rng.standard_normal((len(lengths), num_new, HEADS, SIZE))
    ours = paged_attention(q, k_cache, v_cache, table, lengths, 0.7, causal)
    expected = sequence_by_sequence(q, k_cache, v_cache, table, lengths, 0.7, causal)
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)
    if num_new == 1:  # three axes say the same
        np.testing.assert_array_equal(
            paged_attention(q[:, 0], k_cache, v_cache, table, lengths, 0.7, causal), ours[:, 0]
        )


@pytest.mark.clause("KN-PAGED-4")
def test_the_five_argument_form_covers_every_slot():
    rng = np.random.default_rng(0)
    k_cache, v_cache = rng.standard_normal((2, 5, 4, GROUPS, SIZE))
    q = rng.standard_normal((1, HEADS, SIZE))
    ours = paged_attention(q, k_cache, v_cache, [3, 1], scale=0.5)
    expected = sequence_by_sequence(q[:, None], k_cache, v_cache, [[3, 1]], [8], 0.5)
    np.testing.assert_allclose(ours, expected[:, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.clause("KN-PAGED-1")
def test_ragged_batches_do_not_mix():
    # D-17: without batch and lengths in the signature this case cannot even be asked for.
    v_cache = np.arange(4.0).reshape(4, 1, 1, 1) * np.ones((1, 2, 1, 1))
    k_cache = np.zeros((4, 2, 1, 1))
    out = paged_attention(np.ones((3, 1, 1)), k_cache, v_cache, np.array([[0, 3], [2, -1], [1, 2]]), [4, 1, 3], 1.0)
    assert out.reshape(-1).tolist() == [1.5, 2.0, pytest.approx(4 / 3)]


@pytest.mark.clause("KN-PAGED-2")
def test_consecutive_blocks_are_read_in_place():
    cache = np.arange(48.0).reshape(6, 2, 2, 2)
    for blocks, shared in (
        ([2, 3, 4], True),
        ([5], True),
        ([0, 1], True),
        ([2, 4, 3], False),
        ([1, 3, 3], False),
        ([4, 3], False),
    ):
        rows = gather_blocks(cache, np.array(blocks), 2 * len(blocks) - 1)
        assert np.shares_memory(rows, cache) is shared
        assert rows.tolist() == [r for b in blocks for r in cache[b].tolist()][:-1]


@pytest.mark.clause("KN-PAGED-7")
def test_arguments():
    cache = np.zeros((4, 2, GROUPS, SIZE), np.float32)
    q = np.zeros((2, HEADS, SIZE), np.float32)
    table = np.array([[0, 1], [2, 3]])

    def call(error, match, q=q, k=cache, v=cache, table=table, lengths=(3, 4)):
        with pytest.raises(error, match=match):
            paged_attention(q, k, v, table, lengths, 1.0)

    call(BackendError, r"context_lens\[1\] is 5", lengths=[3, 5])
    call(BackendError, r"context_lens\[0\] is -1", lengths=[-1, 4])
    call(BackendError, r"block_table\[1\] names block 4", table=np.array([[0, 1], [2, 4]]))
    call(BackendError, r"block_table\[0\] names block -1", table=np.array([[0, -1], [2, 3]]))
    call(ShapeError, "one row and one length", lengths=[3])
    call(ShapeError, "one row and one length", table=[0, 1])
    call(ShapeError, "one row and one length", table=table[:1])
    call(ShapeError, "one row and one length", table=table[None])
    call(ShapeError, "paged_attention: q", q=q[0])
    call(ShapeError, "paged_attention: q", k=cache[0])
    call(ShapeError, "paged_attention: q", v=cache[:3])
    call(ShapeError, "attention: q", q=q[:, :3])
    call(InvalidParameterError, "block_table hold float64", table=table * 1.0)
    call(InvalidParameterError, "context_lens hold float64", lengths=[3.0, 4.0])
