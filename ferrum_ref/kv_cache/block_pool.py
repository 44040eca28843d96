"""The pool of blocks: reference counts, and a free list in order of last use, all operations O(1) per block.

The free list is a doubly linked list in two integer lists with a sentinel; blocks are taken at its head (least recently
freed) and come back at its tail. Inside a transaction each operation is journalled so that it can be undone exactly.
Clauses: KV-POOL-1..6 (specs/kv_cache.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ferrum_ref.errors import InternalError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.kv_cache import BlockAllocator
from ferrum_ref.kv_cache.prefix_cache import Eviction, PrefixIndex

Undo = tuple[Callable[..., None], tuple[Any, ...]]


class BlockPool(BlockAllocator):
    """Blocks 0 … num_blocks-1.  [KV-POOL-1..6]"""

    __slots__ = ("_block_size", "_end", "_next", "_previous", "index", "journal", "num_free", "ref_counts")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """All free, in ascending order.  Raises InvalidParameterError unless both are >= 1."""
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise InvalidParameterError(f"BlockPool: {name} must be >= 1, got {value}")
        self._block_size = block_size
        self._end = num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._previous = [num_blocks, *range(num_blocks)]
        self.ref_counts = [0] * num_blocks
        self.num_free = num_blocks
        self.index = PrefixIndex()
        self.journal: list[Undo] | None = None

    # The contract.
    def allocate_blocks(self, num_blocks: int) -> list[int]:
        """That many blocks with one reference each, or ResourceExhaustedError and no change.  [KV-POOL-1]"""
        if num_blocks < 0:
            raise InvalidParameterError(f"allocate_blocks: num_blocks must be >= 0, got {num_blocks}")
        taken = self.take(num_blocks)
        if taken is None:
            raise ResourceExhaustedError(
                f"allocate_blocks: {num_blocks} blocks asked, {self.num_free} of {self._end} free; free a cache first"
            )
        return list(taken)

    def free_blocks(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each.  Raises InvalidParameterError, with no change, on a double free.  [KV-POOL-2]"""
        asked: dict[int, int] = {}
        for block in blocks:
            asked[block] = asked.get(block, 0) + 1
        for block, count in asked.items():
            held = self.ref_counts[block] if 0 <= block < self._end else 0
            if count > held:
                raise InvalidParameterError(f"free_blocks: block {block} has {held} references, {count} to be dropped")
        self.give_back(blocks)

    def free_block_count(self) -> int:
        return self.num_free

    def total_block_count(self) -> int:
        return self._end

    def block_size(self) -> int:
        return self._block_size

    def defragment(self) -> None:
        """Free list in ascending order; blocks in use and findable digests stay.  [KV-POOL-3]

        Raises InternalError inside a transaction.
        """
        if self.journal is not None:
            raise InternalError("BlockPool.defragment: not inside a step; call it between steps")
        self._link(sorted(self.free_list()))

    # The fast core.
    def take(self, num_blocks: int) -> list[int] | None:
        """The `num_blocks` least recently freed blocks with one reference each; None, with no change, if short."""
        if num_blocks > self.num_free:
            return None
        following, refs = self._next, self.ref_counts
        block = following[self._end]
        taken: list[int] = []
        for _ in range(num_blocks):
            taken.append(block)
            refs[block] = 1
            block = following[block]
        following[self._end] = block
        self._previous[block] = self._end
        self.num_free -= num_blocks
        evicted = self.index.evict(taken) if self.index else ()
        if self.journal is not None:
            self.journal.append((self._undo_take, (taken, evicted)))
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each, in order; unreferenced ones join the free list's tail.

        Raises InternalError on a block without a reference.
        """
        following, previous, refs, end = self._next, self._previous, self.ref_counts, self._end
        given = list(blocks)
        last = previous[end]
        num_free = self.num_free
        for block in given:
            count = refs[block] - 1
            if count < 0:
                raise InternalError(f"BlockPool.give_back: block {block} has no reference")
            refs[block] = count
            if not count:
                following[last] = block
                previous[block] = last
                last = block
                num_free += 1
        following[last] = end
        previous[end] = last
        self.num_free = num_free
        if self.journal is not None:
            self.journal.append((self._undo_give_back, (given,)))

    def share(self, block: int) -> None:
        """One more reference; a free block (a prefix hit) leaves the free list from wherever it stands.  [KV-POOL-4]"""
        neighbours = None
        if not self.ref_counts[block]:
            before, after = self._previous[block], self._next[block]
            self._next[before], self._previous[after] = after, before
            self.num_free -= 1
            neighbours = (before, after)
        self.ref_counts[block] += 1
        if self.journal is not None:
            self.journal.append((self._undo_share, (block, neighbours)))

    def free_list(self) -> Iterator[int]:
        """Free blocks, next to be taken first. Pure.  Raises InternalError if the links do not close."""
        block, left = self._next[self._end], self._end
        while block != self._end:
            yield block
            left -= 1
            if left < 0:
                raise InternalError("BlockPool.free_list: the links form a circle without the sentinel")
            block = self._next[block]

    # Undoing, newest first.
    def undo_all(self) -> None:
        """Undo the journal and close it.  [KV-POOL-5]"""
        journal, self.journal = self.journal or [], None
        for function, arguments in reversed(journal):
            function(*arguments)

    def _undo_take(self, taken: list[int], evicted: Sequence[Eviction]) -> None:
        self._push_front(taken)
        for block in taken:
            self.ref_counts[block] = 0
        self.num_free += len(taken)
        self.index.restore(evicted)

    def _push_front(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            head = self._next[self._end]
            self._next[block], self._previous[block] = head, self._end
            self._next[self._end] = self._previous[head] = block

    def _undo_give_back(self, given: list[int]) -> None:
        for block in reversed(given):
            if not self.ref_counts[block]:
                before = self._previous[block]
                self._next[before] = self._end
                self._previous[self._end] = before
                self.num_free -= 1
            self.ref_counts[block] += 1

    def _undo_share(self, block: int, neighbours: tuple[int, int] | None) -> None:
        self.ref_counts[block] -= 1
        if neighbours is not None:
            before, after = neighbours
            self._next[block], self._previous[block] = after, before
            self._next[before] = self._previous[after] = block
            self.num_free += 1

    def _link(self, order: Sequence[int]) -> None:
        """Make `order` the free list."""
        last = self._end
        for block in order:
            self._next[last], self._previous[block] = block, last
            last = block
        self._next[last], self._previous[self._end] = self._end, last
