"""What scheduler and step loop ask of the cache: hits, admission, growth, release, undo, stretches."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InternalError, NotFoundError, SchedulerError
from ferrum_ref.interfaces.kv_cache import MemoryPressure
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.requests import InferenceRequest


def sequence_of(*ids: int) -> SequenceState:
    return SequenceState(InferenceRequest.new("", "m"), array("q", ids), len(ids), 1000, frozenset(), 0.0)


def compute(cache: PagedKvCacheManager, sequence: SequenceState, num_tokens: int) -> None:
    """What a commit does."""
    sequence.num_computed_tokens = num_tokens
    assert sequence.handle is not None
    sequence.handle.table.sequence_length = num_tokens
    cache.register_blocks(sequence)


def run(cache: PagedKvCacheManager, *ids: int) -> SequenceState:
    """A sequence that was admitted and whose tokens are all computed but the last one known."""
    sequence = sequence_of(*ids)
    hits = cache.match_prefix(sequence)
    assert cache.admit(sequence, hits, len(ids))
    compute(cache, sequence, len(ids))
    sequence.tokens.append(0)
    sequence.num_known_tokens += 1
    return sequence


def blocks_of(sequence: SequenceState) -> list[int]:
    assert sequence.handle is not None
    return sequence.handle.table.physical_blocks


@pytest.mark.clause("KV-STEP-1")
def test_a_hit_never_covers_the_whole_text() -> None:
    cache = PagedKvCacheManager(8, 4)
    run(cache, *range(8))
    assert cache.match_prefix(sequence_of(*range(8))) == [0]  # upstream: everything, with a shorter prompt's logits
    assert cache.match_prefix(sequence_of(*range(9))) == [0, 1]
    assert cache.match_prefix(sequence_of(0, 1, 2, 3, 9, 9, 9, 9, 9)) == [0]
    assert cache.match_prefix(sequence_of(9, 1, 2, 3, 4)) == []
    assert cache.match_prefix(sequence_of(0, 1, 2, 3)) == []


@pytest.mark.clause("KV-STEP-2", "KV-MANAGER-6")
def test_admission_takes_hits_and_new_blocks_or_nothing() -> None:
    cache = PagedKvCacheManager(4, 4)
    first = run(cache, *range(8))
    cache.release(first)
    assert list(cache.pool.free_list()) == [2, 3, 1, 0]
    wide = sequence_of(*range(20))
    hits = cache.match_prefix(wide)
    assert not cache.admit(wide, hits, 20)  # 5 blocks of 4, though 2 are hits
    assert wide.handle is None
    assert list(cache.pool.free_list()) == [2, 3, 1, 0]
    assert cache.admit(wide, hits, 12)
    assert blocks_of(wide) == [0, 1, 2]
    assert cache.pool.ref_counts == [1, 1, 1, 0]
    assert cache.stats().cache_hit_rate == 2 / 5  # the first request looked up 1 full block, the second 4


@pytest.mark.clause("KV-STEP-3", "KV-COW-1")
def test_growth_copies_a_block_that_a_clone_shares() -> None:
    cache = PagedKvCacheManager(4, 4)
    sequence = run(cache, 1, 2)
    clone = cache.list_handles()[0][1].clone_handle()
    assert sequence.handle is not None
    assert sequence.handle.writable_tokens == 2  # so that the scheduler has to ask
    assert cache.grow(sequence, 3)
    assert blocks_of(sequence) == [1]
    assert clone.block_table().physical_blocks == [0]
    assert sequence.handle.writable_tokens == 4
    assert not cache.grow(sequence, 17)
    assert blocks_of(sequence) == [1]


@pytest.mark.clause("KV-STEP-4", "KV-PREFIX-4")
def test_the_head_of_a_text_outlives_its_tail() -> None:
    cache = PagedKvCacheManager(4, 2)
    cache.release(run(cache, 1, 2, 3, 4, 5, 6))
    assert list(cache.pool.free_list()) == [3, 2, 1, 0]
    assert cache.match_prefix(sequence_of(1, 2, 3, 4, 5, 6, 7)) == [0, 1, 2]
    run(cache, 9, 9, 9)
    assert cache.match_prefix(sequence_of(1, 2, 3, 4, 5, 6, 7)) == [0, 1]
    assert cache.stats().eviction_count == 1


@pytest.mark.clause("KV-STEP-5")
def test_a_block_is_findable_once_it_is_computed_and_full() -> None:
    cache = PagedKvCacheManager(4, 2)
    sequence = sequence_of(1, 2, 3, 4, 5)
    assert cache.admit(sequence, (), 5)
    assert cache.match_prefix(sequence_of(1, 2, 3)) == ()
    compute(cache, sequence, 3)
    assert cache.match_prefix(sequence_of(1, 2, 3, 4, 5)) == [0]
    compute(cache, sequence, 4)
    assert cache.match_prefix(sequence_of(1, 2, 3, 4, 5)) == [0, 1]


@pytest.mark.clause("KV-STEP-6", "KV-HANDLE-5")
def test_undo_gives_back_caches_and_their_ids() -> None:
    cache = PagedKvCacheManager(4, 2)
    old = run(cache, 1, 2, 3)
    handle = old.handle
    before = list(cache.state_parts())
    cache.begin_step(1.0)
    new = sequence_of(7, 8, 9, 10)
    assert cache.grow(old, 5)
    cache.release(old)
    assert cache.admit(new, (), 8)
    cache.undo_step()
    assert (old.handle, new.handle) == (handle, None)
    assert list(cache.state_parts()) == before
    cache.check_invariants([old])
    cache.begin_step(2.0)
    cache.release(old)
    cache.end_step()
    assert handle is not None
    assert handle.table.physical_blocks == []
    with pytest.raises(InternalError, match="holds no cache"):
        cache.grow(old, 1)


@pytest.mark.clause("KV-STEP-8")
def test_without_prefix_caching_nothing_is_hashed() -> None:
    cache = PagedKvCacheManager(4, 2, enable_prefix_caching=False)
    sequence = run(cache, 1, 2, 3, 4, 5)
    assert sequence.block_digests == []
    assert len(cache.pool.index) == 0
    assert cache.match_prefix(sequence_of(1, 2, 3)) == ()
    assert not cache.caches_prefixes


@pytest.mark.clause("KV-MANAGER-8", "KV-HANDLE-1", "KV-HANDLE-6")
def test_a_step_loops_cache_is_not_for_the_contract() -> None:
    cache = PagedKvCacheManager(4, 2)
    sequence = run(cache, 1, 2, 3)
    handle = cache.get_handle(sequence.request_id)
    assert handle is not None
    assert handle.num_tokens() == 3
    cache.begin_step(42.0)
    cache.end_step()
    assert handle.stats().last_access == 42.0
    for call in (
        lambda: cache.extend_now(handle, 1),
        lambda: cache.deallocate_now(sequence.request_id),
        lambda: cache.free_handle(handle),
    ):
        with pytest.raises(SchedulerError, match="step loop's"):
            call()
    cache.release(sequence)
    with pytest.raises(NotFoundError):
        cache.extend_now(handle, 1)


@pytest.mark.clause("KV-PRESSURE-2")
def test_a_raising_callback_stops_a_step_before_it_begins() -> None:
    cache = PagedKvCacheManager(2, 2)

    def refuse(level: MemoryPressure) -> None:
        raise RuntimeError(level.name)

    cache.set_pressure_callback(refuse)
    sequence = run(cache, 1, 2, 3)
    with pytest.raises(RuntimeError, match="Critical"):
        cache.begin_step(0.0)
    assert cache.pool.journal is None
    cache.begin_step(0.0)  # told once
    cache.end_step()
    cache.check_invariants([sequence])


@pytest.mark.clause("KV-STRETCH-1")
@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 12))
def test_steps_that_the_pool_can_serve(size: int, lengths: list[int], num_spare: int) -> None:
    num_blocks = sum(-(-(length + 1) // size) for length in lengths) + num_spare
    cache = PagedKvCacheManager(num_blocks, size, enable_prefix_caching=False)
    members = [run(cache, *range(length)) for length in lengths]
    for sequence in members:
        assert cache.grow(sequence, sequence.num_computed_tokens + 1)
    steps = 1
    while sum(-(-(length + steps + 1) // size) for length in lengths) <= num_blocks:
        steps += 1
    assert cache.decode_steps(members, 1000) == steps
    assert cache.decode_steps(members, 1) == 1


@pytest.mark.clause("KV-STRETCH-3")
def test_a_request_that_would_fit_is_not_blocked() -> None:
    cache = PagedKvCacheManager(4, 4)
    run(cache, *range(8))
    assert not cache.stays_blocked(sequence_of(*range(100, 108)), 64)
    assert cache.stays_blocked(sequence_of(*range(100, 109)), 64)
    assert not cache.stays_blocked(sequence_of(*range(100, 109)), 8)  # a chunk of it would fit
    assert not cache.stays_blocked(sequence_of(*range(8), 1, 2), 64)  # two of its three blocks are shared
