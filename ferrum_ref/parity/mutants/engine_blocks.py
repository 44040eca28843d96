"""Bugs of block pools, cache managers and step caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ferrum_ref.errors import FerrumError
from ferrum_ref.parity.mutants.wrapped import Wrapped

# Block pool -----------------------------------------------------------------------------------------------------------


class FreesTwice(Wrapped):
    """A block that nobody holds may be freed again, and is then lent twice."""

    def free_blocks(self, blocks: Sequence[int]) -> None:
        try:
            self.inner.free_blocks(blocks)
        except FerrumError:
            return


class LendsPart(Wrapped):
    """When blocks are short, what is left is taken before the error is raised, and stays taken."""

    def allocate_blocks(self, num_blocks: int) -> list[int]:
        free = self.inner.free_block_count()
        if num_blocks > free:
            self.inner.allocate_blocks(free)
        return list(self.inner.allocate_blocks(num_blocks))


class KeepsLast(Wrapped):
    """The last block of a list is never given back."""

    def free_blocks(self, blocks: Sequence[int]) -> None:
        self.inner.free_blocks(list(blocks)[:-1])


class LendsOneTwice(Wrapped):
    """Every third call hands out one block of the call before again."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.calls, self.before = 0, -1

    def allocate_blocks(self, num_blocks: int) -> list[int]:
        taken = list(self.inner.allocate_blocks(num_blocks))
        self.calls += 1
        if self.calls % 3 == 0 and taken and self.before >= 0:
            taken[0] = self.before
        self.before = taken[-1] if taken else self.before
        return taken


class CountsFromOne(Wrapped):
    """Block numbers start at 1: the last one lies beyond the pool."""

    def allocate_blocks(self, num_blocks: int) -> list[int]:
        return [block + 1 for block in self.inner.allocate_blocks(num_blocks)]

    def free_blocks(self, blocks: Sequence[int]) -> None:
        self.inner.free_blocks([block - 1 for block in blocks])


# Cache manager --------------------------------------------------------------------------------------------------------


class RoundsDown(Wrapped):
    """Blocks for whole multiples of the block size only: the last, partial block is missing."""

    async def allocate(self, request: Any) -> Any:
        handle = await self.inner.allocate(request)
        table = handle.block_table()
        if table.sequence_length % table.block_size and len(table.physical_blocks) > 1:
            self.inner.pool.give_back([table.physical_blocks.pop()])
        return handle


class ExtendsLate(Wrapped):
    """A token that begins a new block gets none: growth is noticed one token late."""

    async def extend(self, handle: Any, additional_tokens: int) -> None:
        table = handle.block_table()
        full = table.sequence_length == len(table.physical_blocks) * table.block_size
        if full and additional_tokens == 1:
            table.sequence_length += 1
            return
        await self.inner.extend(handle, additional_tokens)


class ExtendsPartly(Wrapped):
    """An extension that fails keeps the blocks that it had taken already."""

    async def extend(self, handle: Any, additional_tokens: int) -> None:
        try:
            await self.inner.extend(handle, additional_tokens)
        except FerrumError:
            self.inner.pool.take(min(1, self.inner.pool.num_free))
            raise


class AllocatesPartly(Wrapped):
    """An allocation that fails keeps a block."""

    async def allocate(self, request: Any) -> Any:
        try:
            return await self.inner.allocate(request)
        except FerrumError:
            self.inner.pool.take(min(1, self.inner.pool.num_free))
            raise


class LeaksOnRelease(Wrapped):
    """One block of every released cache stays in use."""

    async def deallocate(self, request_id: Any) -> None:
        handle = self.inner.get_handle(request_id)
        if handle is not None:
            self.inner.pool.share(handle.block_table().physical_blocks[-1])
        await self.inner.deallocate(request_id)


class ForksWithoutCount(Wrapped):
    """A fork's blocks are not counted: when the origin goes, they are free."""

    async def deallocate(self, request_id: Any) -> None:
        handle = self.inner.get_handle(request_id)
        shared = [] if handle is None else [int(block) for block in handle.block_table().physical_blocks]
        await self.inner.deallocate(request_id)
        held = [block for block in shared if self.inner.pool.ref_counts[block] > 0]
        self.inner.pool.give_back(held)


class WritesShared(Wrapped):
    """No copy before a write to a shared block."""

    async def extend(self, handle: Any, additional_tokens: int) -> None:
        table = handle.block_table()
        room = len(table.physical_blocks) * table.block_size
        if table.sequence_length + additional_tokens <= room:
            table.sequence_length += additional_tokens
            return
        await self.inner.extend(handle, additional_tokens)


# Step cache -----------------------------------------------------------------------------------------------------------


class HitsWrongBlock(Wrapped):
    """A prefix hit of two blocks or more names the first block twice."""

    def match_prefix(self, sequence: Any) -> Sequence[int]:
        hits = list(self.inner.match_prefix(sequence))
        return [hits[0], *hits[:-1]] if len(hits) > 1 else hits


class HitsByPosition(Wrapped):
    """Prefixes are known by their place alone: what another prompt left there is taken for a hit."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.last: list[int] = []

    def match_prefix(self, sequence: Any) -> Sequence[int]:
        hits = list(self.inner.match_prefix(sequence))
        limit = (sequence.num_known_tokens - 1) // self.inner.block_size
        return hits or self.last[:limit]

    def register_blocks(self, sequence: Any) -> None:
        self.inner.register_blocks(sequence)
        full = sequence.num_computed_tokens // self.inner.block_size
        self.last = [int(block) for block in sequence.handle.table.physical_blocks[:full]]


class RegistersTooEarly(Wrapped):
    """A block counts as full one token before it is."""

    def register_blocks(self, sequence: Any) -> None:
        computed = sequence.num_computed_tokens
        sequence.num_computed_tokens = min(computed + 1, sequence.num_known_tokens)
        try:
            self.inner.register_blocks(sequence)
        finally:
            sequence.num_computed_tokens = computed


class GrowsOneShort(Wrapped):
    """Room for one token fewer than asked."""

    def grow(self, sequence: Any, num_tokens: int) -> bool:
        return bool(self.inner.grow(sequence, num_tokens - 1))


class LeaksWhenShort(Wrapped):
    """An admission that fails for want of blocks keeps one."""

    def admit(self, sequence: Any, hits: Sequence[int], num_tokens: int) -> bool:
        admitted = bool(self.inner.admit(sequence, hits, num_tokens))
        if not admitted and self.inner.pool.num_free:
            journal, self.inner.pool.journal = self.inner.pool.journal, None
            self.inner.pool.take(1)
            self.inner.pool.journal = journal
        return admitted


class FreesSharedTwice(Wrapped):
    """Releasing a request drops two references of every block that others share."""

    def release(self, sequence: Any) -> None:
        blocks = [int(block) for block in sequence.handle.table.physical_blocks]
        self.inner.release(sequence)
        self.inner.pool.give_back([block for block in blocks if self.inner.pool.ref_counts[block] > 0])


class LeaksOnce(Wrapped):
    """The first request that ends while no other runs leaves one block behind."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.has_leaked = False

    def release(self, sequence: Any) -> None:
        if not self.has_leaked and len(self.inner.list_handles()) == 1:
            self.has_leaked = True
            self.inner.pool.share(sequence.handle.table.physical_blocks[0])
        self.inner.release(sequence)


class TrustsSpoiledBlocks(Wrapped):
    """Blocks that a failed step may have overwritten keep their digests."""

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        return
