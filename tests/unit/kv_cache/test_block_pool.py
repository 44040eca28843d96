"""Block pool: order of reuse, reference counts, exact undo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InternalError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.kv_cache.block_pool import BlockPool


@pytest.mark.clause("KV-POOL-1")
def test_blocks_come_in_order_of_last_use_all_or_none() -> None:
    pool = BlockPool(4, 16)
    assert pool.allocate_blocks(3) == [0, 1, 2]
    pool.free_blocks([1, 0])
    with pytest.raises(ResourceExhaustedError, match=r"4 blocks asked, 3 of 4 free"):
        pool.allocate_blocks(4)
    assert pool.free_block_count() == 3
    assert pool.allocate_blocks(3) == [3, 1, 0]
    assert (pool.total_block_count(), pool.block_size()) == (4, 16)
    assert pool.allocate_blocks(0) == []
    with pytest.raises(InvalidParameterError):
        pool.allocate_blocks(-1)
    for broken in ((0, 1), (1, 0)):
        with pytest.raises(InvalidParameterError):
            BlockPool(*broken)


@pytest.mark.clause("KV-POOL-2")
@pytest.mark.parametrize("ids", [[0, 0], [2], [-1], [4]])
def test_a_double_free_changes_nothing(ids: list[int]) -> None:
    pool = BlockPool(4, 1)
    pool.allocate_blocks(2)
    with pytest.raises(InvalidParameterError):
        pool.free_blocks([1, *ids])
    assert pool.ref_counts == [1, 1, 0, 0]
    assert list(pool.free_list()) == [2, 3]
    with pytest.raises(InternalError):
        pool.give_back([3])


@pytest.mark.clause("KV-POOL-3")
def test_defragment_sorts_the_free_list_only() -> None:
    pool = BlockPool(5, 1)
    pool.allocate_blocks(5)
    pool.free_blocks([4, 1, 3])
    pool.defragment()
    assert list(pool.free_list()) == [1, 3, 4]
    assert pool.ref_counts == [1, 0, 1, 0, 0]
    assert pool.allocate_blocks(3) == [1, 3, 4]
    pool.journal = []
    with pytest.raises(InternalError):
        pool.defragment()


@pytest.mark.clause("KV-POOL-4")
def test_sharing_takes_a_free_block_out_of_the_middle() -> None:
    pool = BlockPool(5, 1)
    pool.share(2)
    pool.share(2)
    assert list(pool.free_list()) == [0, 1, 3, 4]
    pool.give_back([2])
    assert list(pool.free_list()) == [0, 1, 3, 4]
    pool.give_back([2])
    assert list(pool.free_list()) == [0, 1, 3, 4, 2]


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int]]:
    return draw(st.lists(st.tuples(st.sampled_from(["take", "give", "share"]), st.integers(0, 7)), max_size=30))


def perform(pool: BlockPool, held: list[list[int]], name: str, number: int) -> None:
    """Take blocks, give some back in reverse, or share one that is findable or held."""
    if name == "take":
        taken = pool.take(number % 4)
        if taken:
            held.append(list(taken))
    elif name == "give" and held:
        pool.give_back(reversed(held.pop(number % len(held))))
    elif name == "share":
        pool.share(number)
        held.append([number])


@pytest.mark.clause("KV-POOL-5", "KV-POOL-6")
@given(operations(), operations(), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=8))
def test_undo_restores_order_references_and_digests(
    before: list[tuple[str, int]], inside: list[tuple[str, int]], digests: list[tuple[int, int]]
) -> None:
    pool, held = BlockPool(8, 1), []
    for name, number in before:
        perform(pool, held, name, number)
    for block, digest in digests:
        if pool.index.digest_of(block) is None:
            pool.index.register(block, bytes([digest]))
    state = (list(pool.free_list()), list(pool.ref_counts), pool.index.state(), pool.num_free, pool.index.num_evictions)
    pool.journal = []
    for name, number in inside:
        perform(pool, held, name, number)
    pool.undo_all()
    assert state == (
        list(pool.free_list()), pool.ref_counts, pool.index.state(), pool.num_free, pool.index.num_evictions
    )  # fmt: skip
    pool.index.check()
    remaining = pool.num_free
    taken = pool.allocate_blocks(remaining)  # the links are whole in both directions
    pool.give_back(taken)
    assert list(pool.free_list()) == taken
