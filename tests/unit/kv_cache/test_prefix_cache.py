"""Chained digests and the index from digests to blocks."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InternalError
from ferrum_ref.kv_cache.prefix_cache import PrefixIndex, extend_digests


def chain(ids: list[int], num_blocks: int, block_size: int) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, array("q", ids), num_blocks, block_size)
    return digests


@pytest.mark.clause("KV-PREFIX-1")
def test_digest_is_blake2b_of_parent_and_little_endian_ids() -> None:
    first = hashlib.blake2b(bytes(16) + struct.pack("<2q", 5, 2**32 - 1), digest_size=16).digest()
    second = hashlib.blake2b(first + struct.pack("<2q", 7, 8), digest_size=16).digest()
    assert chain([5, 2**32 - 1, 7, 8, 9], 2, 2) == [first, second]


@pytest.mark.clause("KV-PREFIX-1", "ST-LOOP-12")
def test_digests_are_the_same_in_every_process() -> None:
    program = (
        "from array import array; from ferrum_ref.kv_cache.prefix_cache import extend_digests as e;"
        "d = []; e(d, array('q', range(64)), 4, 16); print(d[-1].hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("0", "12345")
    }
    assert runs == {chain(list(range(64)), 4, 16)[-1].hex()}


@pytest.mark.clause("KV-PREFIX-2")
@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_equal_digests_mean_equal_texts(one: list[int], other: list[int], size: int) -> None:
    left, right = chain(one, len(one) // size, size), chain(other, len(other) // size, size)
    assert len(left) == len(one) // size
    for i, (a, b) in enumerate(zip(left, right, strict=False), start=1):
        assert (a == b) == (one[: i * size] == other[: i * size])


@pytest.mark.clause("KV-PREFIX-1")
@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8), st.lists(st.integers(0, 4), max_size=3))
def test_growing_on_demand_gives_the_same_chain(ids: list[int], stops: list[int]) -> None:
    digests: list[bytes] = []
    for stop in [*stops, 4]:
        extend_digests(digests, array("q", ids), stop, 2)
    assert digests == chain(ids, 4, 2)


@pytest.mark.clause("KV-PREFIX-3", "KV-PREFIX-4")
def test_the_oldest_holder_answers_and_the_next_takes_over() -> None:
    index = PrefixIndex()
    for block in (4, 2, 9):
        index.register(block, b"same")
    index.register(1, b"other")
    assert index.find(b"same") == 4
    assert index.holders(b"same") == (4, 2, 9)
    gone = index.evict([7, 4, 1])
    assert index.find(b"same") == 2
    assert index.find(b"other") is None
    assert (index.num_evictions, len(index)) == (2, 2)
    index.restore(gone)
    assert index.holders(b"same") == (4, 2, 9)
    assert index.find(b"other") == 1
    assert index.num_evictions == 0
    index.evict([2, 9, 4])
    assert index.holders(b"same") == ()
    index.check()


@pytest.mark.clause("KV-POOL-6")
def test_check_finds_a_lost_holder() -> None:
    index = PrefixIndex()
    index.register(3, b"x")
    index._holders.clear()
    with pytest.raises(InternalError, match="holders differ"):
        index.check()
