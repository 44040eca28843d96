"""Many decode steps at once: how many the pool can serve, and the blocks they take, in the order single steps would.

In a stretch every member gains one token per step. A member with `slack` writable positions left behind the step in
flight fills its block in step slack + 1 and needs the next one in step slack + 2; then again every block_size steps. So
members are ordered by slack, and nothing is done per token.
Clauses: KV-STRETCH-1..3 (specs/kv_cache.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.step import SequenceState, StepHandle
from ferrum_ref.kv_cache.audit import check_cache, state_of
from ferrum_ref.kv_cache.prefix_cache import extend_digests
from ferrum_ref.kv_cache.step_cache import StepCacheCore


class DecodeStretchCore(StepCacheCore):
    """The step core's part for stretches, its self-check and its state."""

    def decode_steps(self, members: Sequence[SequenceState], max_steps: int) -> int:
        """Steps, of at most `max_steps`, that the free blocks can serve. Pure.  [KV-STRETCH-1]

        The first step is the one in flight: its positions are writable already.
        """
        size, free = self._block_size, self.pool.num_free
        if len(members) * (-(-max_steps // size)) <= free:
            return max_steps
        slacks = sorted([_handle(sequence).writable_tokens - sequence.num_computed_tokens - 1 for sequence in members])
        cycles, left = divmod(free, len(members))
        return min(max_steps, 1 + cycles * size + slacks[left])

    def grow_decode(self, members: Sequence[SequenceState], num_steps: int) -> None:
        """Blocks and digests of `num_steps` committed decode steps.  [KV-STRETCH-2]

        The members' counts and tokens are already those after the stretch. Mutates handles, pool and prefix index.
        """
        size = self._block_size
        filling: list[tuple[int, int, SequenceState]] = []  # (slack, place among the members, member)
        num_taken = 0
        for place, sequence in enumerate(members):
            slack = _handle(sequence).writable_tokens - sequence.num_computed_tokens + num_steps - 1
            if slack < num_steps:
                filling.append((slack, place, sequence))
                num_taken += (num_steps - 2 - slack) // size + 1
        if not filling:
            return
        filling.sort()
        if num_taken:
            self._distribute(filling, num_taken, num_steps)
        if self._caches_prefixes:
            for sequence in _in_order_of_steps(filling, size, num_steps - 1):
                self._register_next(sequence)

    def _distribute(self, filling: list[tuple[int, int, SequenceState]], num_taken: int, num_steps: int) -> None:
        taken = self.pool.take(num_taken)
        if taken is None:
            raise InternalError(f"grow_decode: {num_taken} blocks needed, {self.pool.num_free} free")
        size = self._block_size
        for block, sequence in zip(taken, _in_order_of_steps(filling, size, num_steps - 2), strict=True):
            handle = _handle(sequence)
            handle.table.physical_blocks.append(block)
            handle.writable_tokens += size

    def _register_next(self, sequence: SequenceState) -> None:
        handle, digests = _handle(sequence), sequence.block_digests
        position = handle.num_registered_blocks
        extend_digests(digests, sequence.tokens, position + 1, self._block_size)
        self.pool.index.register(handle.table.physical_blocks[position], digests[position])
        handle.num_registered_blocks = position + 1

    def stays_blocked(self, sequence: SequenceState, max_new_tokens: int) -> bool:
        """Can `sequence` certainly not be admitted while the running requests only decode. Pure.  [KV-STRETCH-3]

        Decoding only takes free blocks. It may evict cached blocks of the prefix, so the least need over every prefix
        that can be left counts; and when a member's new block continues the prefix, that saves the request one block,
        but the member takes its own next block first.
        """
        size, pool, known = self._block_size, self.pool, sequence.num_known_tokens
        num_hits = len(self.match_prefix(sequence))
        num_shared = 0
        for num_left in range(num_hits + 1):
            start = num_left * size
            needed = -(-(start + min(known - start, max_new_tokens)) // size) - num_shared
            if needed <= pool.num_free:
                return False
            if num_left < num_hits:
                holders = pool.index.holders(sequence.block_digests[num_left])
                num_shared += any(pool.ref_counts[block] for block in holders)
        return True

    def check_invariants(self, sequences: Iterable[SequenceState]) -> None:
        """Conservation of blocks and references.  Raises InternalError.  [KV-POOL-6]"""
        with self.lock:
            forks = [table for _, table in self._forks.values()]
            check_cache(self.pool, list(self._handles.values()), forks, list(sequences))

    def state_parts(self) -> Iterable[object]:
        """Everything that decides future behaviour, as a canonical stream of plain values. Pure."""
        yield from state_of(self.pool, list(self._handles.values()), [table for _, table in self._forks.values()])
        yield (*self._counters(), self._num_failures)


def _handle(sequence: SequenceState) -> StepHandle:
    handle = sequence.handle
    if handle is None:
        raise InternalError(f"kv_cache: request {sequence.request_id} holds no cache")
    return handle


def _in_order_of_steps(
    filling: list[tuple[int, int, SequenceState]], block_size: int, last: int
) -> Iterator[SequenceState]:
    """The members once for each slack + k * block_size <= last, in order of that step, then of their places."""
    for cycle in range(0, last + 1, block_size):
        for slack, _, sequence in filling:
            if slack + cycle > last:
                return
            yield sequence
